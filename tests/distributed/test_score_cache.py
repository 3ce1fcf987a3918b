"""Stored reference losses: the same in every layout, and in training."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from distributed.test_layouts import LAYOUTS

import oracle
from forked_jobs import Server
from jobs import (
    GLOBAL_BATCH,
    SEQUENCE,
    STEPS,
    VOCABULARY,
    Checkpoints,
    Corpus,
    from_own_checkpoint,
)
from launch import REPOSITORY, Run, launch, pretrain, start
from megatron_slm.data.score_cache import Section, decode, encode
from megatron_slm.data.score_manifest import read_cache_manifest
from megatron_slm.data.token_dump import read_dumps

TOOL = str(REPOSITORY / "tools" / "score_reference.py")
MICRO_BATCH = 3
RUN = f"--train-iters {STEPS} --global-batch-size {GLOBAL_BATCH} --eval-iters 1"
RUN += f" --eval-interval 1000 --micro-batch-size {MICRO_BATCH}"
RECORDED = "recorded_pretrain"
# Scores this close to the threshold may fall on either side of it: two stored losses' error.
NEAR_TIE = 4e-4
SECONDS = 120  # against a hang
DUMP = "--slm-dump-interval 2 --slm-dump-dir dump"


def job(corpus: Corpus, start: Checkpoints, cache: Path, extra: str = "") -> list[str]:
    """Arguments of a scoring job: the run's, without a policy."""
    return [
        TOOL,
        *corpus.arguments,
        *RUN.split(),
        *["--slm-reference-load", str(start.reference), "--slm-reference-cache", str(cache)],
        *extra.split(),
    ]


def run_arguments(corpus: Corpus, start: Checkpoints, extra: str) -> list[str]:
    arguments = [*corpus.arguments, *start.without_reference, *RUN.split()]
    return arguments + f"--slm-token-ratio 0.6 {extra}".split()


def train(
    corpus: Corpus, start: Checkpoints, directory: Path, extra: str, ranks: int = 1, **kwargs: Any
) -> Run:
    arguments = run_arguments(corpus, start, extra)
    return pretrain(ranks, arguments, directory, module=RECORDED, **kwargs)


def resume(
    corpus: Corpus,
    start: Checkpoints,
    saved: Path,
    directory: Path,
    extra: str,
    ranks: int = 1,
    **kwargs: Any,
) -> Run:
    arguments = from_own_checkpoint(run_arguments(corpus, start, extra), saved)
    return pretrain(ranks, arguments, directory, module=RECORDED, **kwargs)


def contents(cache: Path) -> dict[str, str]:
    """Hashes of what can be read as good: all but what a kill left under another name."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix != ".partial"
    }


def losses(cache: Path, section: str) -> np.ndarray:
    manifest = read_cache_manifest(cache)
    stored = Section(cache, manifest, section)
    return np.stack([stored.losses(number, None) for number in range(len(stored))])


@pytest.fixture(scope="module")
def exact(corpus: Corpus, untied: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one rank, in float32."""
    cache = tmp_path_factory.mktemp("exact") / "cache"
    extra = "--cache-dtype float32 --shard-samples 9"
    launch(1, job(corpus, untied, cache, extra), cache.parent / "job")
    return cache


@pytest.fixture(scope="module")
def online(corpus: Corpus, untied: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run with the reference online."""
    extra = f"--slm-reference-load {untied.reference} {DUMP}"
    return train(corpus, untied, tmp_path_factory.mktemp("online"), extra)


def records(run: Run) -> list[dict[str, Any]]:
    saved: list[dict[str, Any]] = torch.load(run.directory / "recorded" / "rank0.pt")["records"]
    return saved


TAGS = ("lm loss", "reference loss", "excess loss", "threshold", "grad-norm")
VALIDATION = ("lm loss validation", "excess loss validation")


def test_training_with_exact_losses_is_online_training(
    corpus: Corpus, untied: Checkpoints, exact: Path, online: Run, tmp_path: Path
) -> None:
    """Bit for bit, in validation too, with losses read by loader workers."""
    extra = f"--slm-reference-cache {exact} --num-workers 2 {DUMP}"
    run = train(corpus, untied, tmp_path, extra)
    for tag in TAGS:
        assert len(online.scalars(tag)) == STEPS
        assert run.scalars(tag) == online.scalars(tag)
    for one, other in zip(records(run), records(online), strict=True):
        assert torch.equal(one["selected"], other["selected"])
    for tag in VALIDATION:
        assert run.scalars(tag) == online.scalars(tag) != {}
    dumps = [read_dumps(each.directory / "dump") for each in (run, online)]
    for one, other in zip(*dumps, strict=True):
        assert np.array_equal(one.reference_losses, other.reference_losses)
        assert np.array_equal(one.losses, other.losses)


def test_a_run_goes_on_from_a_cache(
    corpus: Corpus, untied: Checkpoints, exact: Path, online: Run, tmp_path: Path
) -> None:
    """What began with the checkpoint at hand, with its stored losses; not with another's, and not
    beyond what was scored."""
    saved = tmp_path / "saved"
    load = f"--slm-reference-load {untied.reference} --save {saved} --save-interval 2"
    train(corpus, untied, tmp_path / "began", f"{load} --exit-interval 2")
    cached = f"--slm-reference-cache {exact}"
    run = resume(corpus, untied, saved, tmp_path / "resumed", cached)
    for tag in TAGS:
        assert run.scalars(tag) == {i: v for i, v in online.scalars(tag).items() if i > 2}

    other = f"--slm-reference-load {untied.policy}"
    run = resume(corpus, untied, saved, tmp_path / "other", other, check=False)
    assert run.codes == [2] and "so far, and now the reference is" in run.outputs[0]
    longer = f"{cached} --train-iters 7"
    run = train(corpus, untied, tmp_path / "longer", longer, check=False)
    assert run.codes == [2]
    assert "the run draws 84 train samples, and the score cache has 60" in run.outputs[0]


def test_every_stage_dumps_the_split_that_was_scored(
    corpus: Corpus, untied: Checkpoints, server: Server, tmp_path: Path
) -> None:
    """Without validation, the training samples, also where Megatron has built others."""
    none = "--eval-iters 0 --train-iters 2"
    cache = tmp_path / "cache"
    server.run("score", 1, job(corpus, untied, cache, none)[1:], tmp_path / "job")
    extra = f"{none} --slm-reference-cache {cache} {DUMP}"
    dumps = []
    for ranks in (1, 2):
        layout = f" --pipeline-model-parallel-size {ranks}"
        directory = tmp_path / f"pp{ranks}"
        server.run("train", ranks, run_arguments(corpus, untied, extra + layout), directory)
        dumps.append(read_dumps(directory / "dump")[0])
    one, other = dumps
    assert one.about.split == other.about.split == "train"
    assert np.array_equal(one.tokens, other.tokens)
    assert np.allclose(one.losses, other.losses, rtol=1e-5)


def test_damage_found_while_training(
    corpus: Corpus, untied: Checkpoints, exact: Path, tmp_path: Path
) -> None:
    """By a loader's worker: one line that names shard and sample, and exit code 2."""
    broken = tmp_path / "broken"
    shutil.copytree(exact, broken)
    shard = broken / "train" / "00002.losses"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    extra = f"--slm-reference-cache {broken} --num-workers 1"
    run = train(corpus, untied, tmp_path / "run", extra, check=False)
    assert run.codes == [2]
    (error,) = [line for line in run.outputs[0].splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {shard} is damaged at record 8 (sample 26)")
    assert "Traceback" not in run.outputs[0]


def test_training_with_two_bytes_a_token(
    corpus: Corpus, untied: Checkpoints, online: Run, tmp_path: Path
) -> None:
    """What is selected differs at near-ties alone, and hardly ever.  There is no validation, and so
    no section of it; dumps are of training samples."""
    launch(1, job(corpus, untied, tmp_path / "cache", "--eval-iters 0"), tmp_path / "job")
    assert not (tmp_path / "cache" / "valid").exists()
    extra = f"--slm-reference-cache {tmp_path / 'cache'} --eval-iters 0 {DUMP}"
    run = train(corpus, untied, tmp_path / "run", extra)
    dumps = read_dumps(run.directory / "dump")
    assert {dump.about.split for dump in dumps} == {"train"}
    first, second = records(run), records(online)
    differing = total = 0
    for one, other in zip(first, second, strict=True):
        threshold = other["scores"][other["selected"]].min()
        apart = one["selected"] != other["selected"]
        assert ((other["scores"] - threshold)[apart].abs() < NEAR_TIE).all()
        differing += int(apart.sum())
        total += apart.numel()
    assert differing <= total / 1000, (differing, total)


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "dp2", "cp2"])
def test_losses_do_not_depend_on_the_layout(
    layout: str, corpus: Corpus, untied: Checkpoints, exact: Path, tmp_path: Path
) -> None:
    ranks, flags = LAYOUTS[layout]
    # Another micro-batch size, that does not divide the shards.
    extra = f"--cache-dtype float32 --shard-samples 9 {flags} --micro-batch-size 2"
    launch(ranks, job(corpus, untied, tmp_path / "cache", extra), tmp_path / "job")
    assert contents(tmp_path / "cache").keys() == contents(exact).keys()
    for section in ("train", "valid"):
        np.testing.assert_allclose(
            losses(tmp_path / "cache", section), losses(exact, section), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (3, "--micro-batch-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--context-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    ],
)
def test_a_cache_serves_every_layout(
    ranks: int, flags: str, corpus: Corpus, untied: Checkpoints, exact: Path, tmp_path: Path
) -> None:
    """More ranks than scored it, another micro-batch size: as online in the same layout."""
    of = f"--slm-scope data-parallel {flags}"
    runs = [
        train(corpus, untied, tmp_path / name, f"{source} {of}", ranks)
        for name, source in (
            ("online", f"--slm-reference-load {untied.reference}"),
            ("cached", f"--slm-reference-cache {exact}"),
        )
    ]
    for tag in TAGS:
        assert runs[1].scalars(tag) == pytest.approx(runs[0].scalars(tag), rel=1e-5, abs=1e-5)


def test_a_shard_that_cannot_be_written(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """By the second of two ranks: the first does not wait for it for ever, and the rest is kept."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "valid").write_text("no directory")
    extra = f"--shard-samples {GLOBAL_BATCH}"  # five of training, and the last
    run = launch(2, job(corpus, untied, cache, extra), tmp_path / "job", check=False, timeout=200)
    assert run.codes == [2, 2]
    for output in run.outputs:
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert f"{cache}/valid" in error and "the same command goes on" in error
        assert "Traceback" not in output
    assert len(list((cache / "train").iterdir())) == STEPS


def test_a_replica_whose_data_cannot_be_read(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """Its worker is killed, as where memory runs out: the first rank does not wait for ever."""
    extra = "--shard-samples 96 --train-iters 80 --num-workers 1"
    tool, *arguments = job(corpus, untied, tmp_path / "cache", extra)
    started = start(2, [tool, *arguments], tmp_path / "job")
    try:
        workers: list[str] = []
        while not workers and started.processes[1].exitcode is None:
            tasks = Path(f"/proc/{started.processes[1].pid}/task").glob("*/children")
            workers = "".join(task.read_text() for task in tasks).split()
        os.kill(int(workers[0]), signal.SIGKILL)
        for process in started.processes:
            process.join(SECONDS)
            assert process.exitcode == 2
    finally:
        for process in started.processes:
            process.kill()
    first, second = (file.read_text().splitlines()[-1] for file in started.files)
    assert first == "error: rank 1 has ended by a RuntimeError; see what it says"
    assert "error: a worker that loads data was killed" in second


def test_a_cache_that_nodes_do_not_share(
    corpus: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """The first rank would wait for ever for shards that lie on other disks."""
    for rank in range(2):
        (tmp_path / f"node{rank}" / "cache").mkdir(parents=True)
    _, *arguments = job(corpus, untied, Path("cache"))
    command = ["-m", "impatient_score", *arguments]
    run = launch(2, command, tmp_path, check=False, timeout=SECONDS, apart=True)
    assert run.codes == [2, 2]
    for output in run.outputs:
        assert "does not have what the first rank wrote there" in output.splitlines()[-1]


@pytest.fixture(scope="module")
def by_document(
    corpus: Corpus, untied: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    cache = tmp_path_factory.mktemp("documents") / "cache"
    extra = "--by document --cache-dtype float32 --tensor-model-parallel-size 2"
    launch(2, job(corpus, untied, cache, extra), cache.parent / "job")
    return cache


def test_losses_by_document(corpus: Corpus, untied: Checkpoints, by_document: Path) -> None:
    """Those that Hugging Face computes of the file's tokens, window by window."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(corpus.prefix))
    stream = np.concatenate([[VOCABULARY - 1], *(dataset[i] for i in range(len(dataset)))])
    count = (len(stream) - 1) // SEQUENCE
    labels = torch.from_numpy(stream[1 : count * SEQUENCE + 1].astype(np.int64))
    tokens = torch.from_numpy(stream[: count * SEQUENCE].astype(np.int64))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        checkpoint = untied.reference / "iter_0000010"
        model = oracle.llama(checkpoint, Path(scratch), heads=6, groups=6, tied=False)
        logits = model(tokens.view(count, SEQUENCE)).logits[..., :VOCABULARY]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    stored = losses(by_document, corpus.prefix.name)
    assert len(stored) - count in (0, 1)
    np.testing.assert_allclose(stored[:count].ravel(), expected.numpy(), rtol=1e-5, atol=2e-5)


def test_transformers_gives_the_same_losses(
    corpus: Corpus, untied: Checkpoints, by_document: Path, tmp_path: Path
) -> None:
    """Scored by the reference's weights in transformers, on two ranks that do not know each other,
    with nothing else but the origin that tells the two caches apart."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    checkpoint = untied.reference / "iter_0000010"
    oracle.llama(checkpoint, tmp_path, heads=6, groups=6, tied=False).save_pretrained(
        tmp_path / "hf"
    )
    tool = TOOL.replace("score_reference", "score_with_model")
    data = f"--data-path {corpus.prefix} --seq-length {SEQUENCE} --tokenizer-type NullTokenizer"
    own = f"--vocab-size {VOCABULARY} --model {tmp_path}/hf --slm-reference-cache {tmp_path}/cache"
    command = [tool, *f"{data} {own} --cache-dtype float32".split()]
    launch(2, command, tmp_path / "job")
    one, other = (read_cache_manifest(each) for each in (tmp_path / "cache", by_document))
    assert msgspec.structs.replace(one, reference=other.reference) == other
    dataset = IndexedDataset(str(corpus.prefix))
    tokens = dataset.index.sequence_lengths.sum()
    found, expected = (
        losses(each, corpus.prefix.name).ravel()[:tokens]
        for each in (tmp_path / "cache", by_document)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_losses_by_document_serve_other_runs(
    corpus: Corpus, untied: Checkpoints, by_document: Path, exact: Path, tmp_path: Path
) -> None:
    """Of another seed, length and split; with the run's own they come close to losses by sample."""
    for name, extra in (("same", ""), ("other", "--seed 7 --seq-length 48 --split 70,30,0")):
        run = train(corpus, untied, tmp_path / name, f"--slm-reference-cache {by_document} {extra}")
        assert len(run.scalars("excess loss")) == STEPS
    same = torch.cat([record["reference"] for record in _in_order(tmp_path / "same")])
    by_sample = torch.from_numpy(losses(exact, "train"))[: len(same)]
    assert 0.0 < (same - by_sample).abs().mean() < 0.2


def _in_order(directory: Path) -> list[dict[str, Any]]:
    saved = torch.load(directory / "recorded" / "rank0.pt")["records"]
    return sorted(saved, key=lambda record: (record["iteration"], record["number"]))


def test_inspect(by_document: Path, exact: Path, tmp_path: Path) -> None:
    """A table, a drawing, and what is damaged."""
    run = launch(1, [TOOL, "inspect", str(exact), "--plot", "drawn.svg"], tmp_path)
    table = [line.split() for line in run.outputs[0].splitlines() if "docstrings" in line]
    values = np.concatenate([losses(exact, section).ravel() for section in ("train", "valid")])
    _, tokens, mean, *percentiles = table[0]
    assert int(tokens.replace(",", "")) == values.size
    assert float(mean) == pytest.approx(values.mean(), abs=1e-3)
    expected = np.percentile(values, [1, 10, 25, 50, 75, 90, 99], method="inverted_cdf")
    assert [float(text) for text in percentiles] == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "drawn.svg").read_text().rstrip().endswith("</svg>")

    broken = tmp_path / "broken"
    shutil.copytree(by_document, broken)
    shard = sorted(broken.rglob("*.losses"))[1]
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    run = launch(1, [TOOL, "inspect", str(broken)], tmp_path / "run", check=False)
    assert run.codes == [2]
    assert f"{shard} is damaged at record 0" in run.outputs[0]


def test_encoding() -> None:
    """As close as the module says, over all losses that can occur, and no further off beyond."""
    values = np.concatenate([np.linspace(0.0, 63.9, 100_001), np.logspace(-8, 1.8, 100_001)])
    exact = values.astype(np.float32)
    stored = encode(exact, "uint16")
    assert stored.dtype == np.uint16
    error = np.abs(decode(stored) - values)
    assert (error <= (np.sqrt(values) + 1e-4) / 8192 + 2e-7 * values).all()
    assert decode(encode(np.array([-1e-7, 70.0, 1e9], np.float32), "uint16")) == pytest.approx(
        [0.0, 63.998, 63.998], abs=1e-3
    )
    assert decode(encode(exact, "float32")).tobytes() == exact.tobytes()
