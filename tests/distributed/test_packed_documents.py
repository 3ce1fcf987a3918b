"""Documents that do not see each other: one answer in every layout, which is the oracle's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracle
from agreement import (
    agrees_with_oracle,
    dumps_agree_with_oracle,
    oracle_models,
    train_oracle,
)
from forked_jobs import Server
from gpt_datasets import samples_of
from jobs import STEPS, VOCABULARY, Checkpoints, Corpus, as_hybrid, write_dataset
from launch import Run
from megatron_slm.data.token_dump import read_dumps
from real_text import docstrings

RATIO = 0.6
MASKED = "--dataloader-inter-document-masking"
TP2, PP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline"))
CP2 = "--context-parallel-size 2"
LAYOUTS = {
    # ranks, samples of a micro-batch
    "dp2": (2, 3, ""),
    "tp2 sp": (2, 1, f"{TP2} --sequence-parallel"),
    "pp2": (2, 1, PP2),
    "pp2 vpp2": (2, 3, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "cp2": (2, 3, CP2),
    "tp2 cp2": (4, 1, f"{TP2} {CP2}"),
    "pp2 cp2": (4, 3, f"{PP2} {CP2}"),
    "pp2, hybrid": (2, 3, PP2),
    "cp2, hybrid": (2, 3, CP2),
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of a line and of several samples, and some of a single token."""
    found = []
    for text in docstrings(["argparse", "difflib", "statistics"]):
        found += [*text.splitlines(), text]
    return found


@pytest.fixture(scope="module")
def packed(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    prefix = tmp_path_factory.mktemp("packed") / "lines"
    write_dataset(prefix, texts)
    return Corpus(prefix)


@pytest.fixture(scope="module")
def both(packed: Corpus) -> list[dict[str, Tensor]]:
    """Training and validation samples; a document ends with its end-of-document token."""
    parts = samples_of(packed)
    for samples in parts:
        ends = samples["tokens"] == VOCABULARY - 1
        samples["documents"] = ends.long().cumsum(1) - ends.long()
    return parts


@pytest.fixture(scope="module")
def oracles(both: list[dict[str, Tensor]], untied: Checkpoints) -> dict[int, list[oracle.Step]]:
    """By micro-batch size."""
    return {size: train_oracle(untied, *both, oracle.Method(RATIO, size, size)) for size in (1, 3)}


def run(
    server: Server,
    ranks: int,
    start: Checkpoints,
    corpus: Corpus,
    extra: str,
    directory: Path,
    pattern: str | None = None,
) -> Run:
    """pattern: of the policy's layers, if it is a hybrid model."""
    arguments = [
        *corpus.arguments,
        *(as_hybrid(start.arguments, pattern) if pattern else start.arguments),
        *f"--train-iters {STEPS} --slm-token-ratio {RATIO} {extra}".split(),
        *"--tensorboard-dir tensorboard --num-workers 0".split(),
    ]
    outputs = server.run("record", ranks, arguments, directory)
    return Run(directory, outputs, [0] * ranks)


def test_the_oracle_keeps_documents_apart(
    both: list[dict[str, Tensor]], untied: Checkpoints
) -> None:
    """Its mask gives what a forward pass of each document gives; samples have all there is."""
    samples, _ = both
    several = [set(row.tolist()) for row in samples["documents"]]
    assert max(map(len, several)) > 4 and min(map(len, several)) == 1
    policy, _ = oracle_models(untied)
    tokens, documents = samples["tokens"][:12], samples["documents"][:12]
    with torch.no_grad():
        masked = oracle.logits_of(policy, tokens, documents)
        for row, numbers, logits in zip(tokens, documents, masked, strict=True):
            alone = [policy(row[None, numbers == number]).logits[0] for number in numbers.unique()]
            torch.testing.assert_close(torch.cat(alone), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_oracle(
    layout: str,
    server: Server,
    packed: Corpus,
    both: list[dict[str, Tensor]],
    untied: Checkpoints,
    oracles: dict[int, list[oracle.Step]],
    tmp_path: Path,
) -> None:
    ranks, size, flags = LAYOUTS[layout]
    dump = "--slm-dump-interval 3 --slm-dump-dir dump"
    extra = f"{MASKED} --micro-batch-size {size} {dump} {flags}"
    pattern = "*-*-*-*-" if layout.endswith("hybrid") else None
    done = run(server, ranks, untied, packed, extra, tmp_path, pattern)
    agrees_with_oracle(done, oracles[size], size)
    dumps_agree_with_oracle(done, oracles[size], both[1], oracle.Method(RATIO, size, size))


@pytest.mark.parametrize(("ranks", "flags"), [(1, ""), (2, PP2)])
def test_as_one_sequence(
    ranks: int,
    flags: str,
    server: Server,
    packed: Corpus,
    untied: Checkpoints,
    oracles: dict[int, list[oracle.Step]],
    tmp_path: Path,
) -> None:
    """As Megatron passes them to layers of its own: all samples of a micro-batch in a row."""
    layers = "--spec one_sequence_layers layers --slm-head dense"
    extra = f"{MASKED} --micro-batch-size 3 --slm-reference-micro-batch-size 6 {layers} {flags}"
    done = run(server, ranks, untied, packed, extra, tmp_path)
    agrees_with_oracle(done, oracles[3], 3)


def test_stages_between(
    server: Server, packed: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """Stages that have no tokens know the documents; the reference has to have as many layers."""
    own = Checkpoints(untied.policy, untied.policy, tied=False)
    extra = f"{MASKED} --micro-batch-size 3 --slm-reference-micro-batch-size 6"
    losses = []
    for ranks, flags in ((1, ""), (4, "--pipeline-model-parallel-size 4")):
        done = run(server, ranks, own, packed, f"{extra} {flags}", tmp_path / str(ranks))
        losses.append([*done.scalars("lm loss").values(), *done.scalars("grad-norm").values()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_samples_of_one_document(server: Server, untied: Checkpoints, tmp_path: Path) -> None:
    """To the bit what they give without the option."""
    prefix = tmp_path / "whole"
    write_dataset(prefix, ["\n".join(docstrings(["argparse", "difflib", "statistics"]))])
    alone = "--micro-batch-size 3 --split 1,0,0 --eval-iters 0"
    runs = [
        run(server, 1, untied, Corpus(prefix), f"{alone} {extra}", tmp_path / name)
        for name, extra in (("with", MASKED), ("without", ""))
    ]
    for tag in ("lm loss", "reference loss", "threshold", "grad-norm"):
        assert runs[0].scalars(tag) == runs[1].scalars(tag)


def test_other_documents_do_not_matter(
    server: Server, texts: list[str], packed: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """With other tokens in two documents of three, the others' losses are the same to the bit."""
    prefix = tmp_path / "changed"
    write_dataset(prefix, [text.swapcase() if n % 3 else text for n, text in enumerate(texts)])
    dumps = []
    for name, corpus in (("as is", packed), ("changed", Corpus(prefix))):
        extra = f"{MASKED} --micro-batch-size 3 --train-iters 1 {CP2}"
        dump = "--slm-dump-interval 1 --slm-dump-dir dump"
        done = run(server, 2, untied, corpus, f"{extra} {dump}", tmp_path / name)
        dumps.append(read_dumps(done.directory / "dump")[0])
    one, other = dumps
    tokens = torch.from_numpy(one.tokens)
    ends = (tokens == VOCABULARY - 1).long()
    documents = ends.cumsum(1) - ends
    differ = torch.from_numpy(one.tokens != other.tokens)
    touched = torch.stack(
        [torch.isin(row, row[changed]) for row, changed in zip(documents, differ, strict=True)]
    )
    # The label of a document's last token is the first one of the next.
    untouched = ~touched[:, :-1] & ~differ[:, 1:]
    assert 0.1 < untouched.float().mean() < 0.9
    for name in ("losses", "reference_losses"):
        same = torch.from_numpy(getattr(one, name) == getattr(other, name))
        assert same[untouched].all() and not same[touched[:, :-1]].all()


def test_full_validation(
    server: Server, texts: list[str], packed: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """Megatron then reads one sample at a time, whatever the size of a micro-batch is."""
    write_dataset(tmp_path / "few", texts[:40])
    arguments = [*packed.arguments, *untied.arguments]
    at = arguments.index("--data-path")
    data = f"--train-data-path {packed.prefix} --valid-data-path {tmp_path / 'few'}"
    arguments[at : at + 4] = data.split()  # in the place of --split, too
    extra = f"{MASKED} --slm-token-ratio 0.6 --train-iters 1 --micro-batch-size 3"
    extra += " --full-validation --multiple-validation-sets --tensorboard-dir tensorboard"
    found = []
    for size in ("1", "3"):
        own = [*arguments, *extra.split(), "--eval-micro-batch-size", size]
        server.run("train", 1, own, tmp_path / size)
        scalars = Run(tmp_path / size, [], []).scalars
        tag = next(tag for tag in Run(tmp_path / size, [], []).tags() if "excess loss val" in tag)
        found.append(list(scalars(tag).values()))
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-5)


def test_full_validation_by_stages(
    server: Server, texts: list[str], packed: Corpus, untied: Checkpoints, tmp_path: Path
) -> None:
    """Stages that read nothing, and virtual stages, validate each set as one process does."""
    write_dataset(tmp_path / "few", texts[:20])
    write_dataset(tmp_path / "others", texts[20:50])
    arguments = [*packed.arguments, *untied.without_reference]
    at = arguments.index("--data-path")
    arguments[at : at + 4] = ["--train-data-path", str(packed.prefix)]  # and --split
    arguments += ["--valid-data-path", str(tmp_path / "few"), str(tmp_path / "others")]
    arguments += "--full-validation --multiple-validation-sets --eval-global-batch-size 2".split()
    arguments += "--slm-token-ratio 0.6 --slm-score policy --micro-batch-size 1".split()
    arguments += "--train-iters 1 --tensorboard-dir tensorboard".split()
    arguments += "--slm-dump-interval 1 --slm-dump-dir dump".split()
    found, dumps = [], []
    for ranks, flags in ((1, ""), LAYOUTS["pp2 vpp2"][::2], (4, PP2.replace("2", "4"))):
        directory = tmp_path / (flags or "one")
        server.run("train", ranks, [*arguments, *flags.split()], directory)
        run = Run(directory, [], [])
        tags = [f"{name} loss validation-{i}" for name in ("lm", "selected") for i in range(2)]
        found.append([run.scalars(tag)[1] for tag in tags])
        dumps.append(read_dumps(directory / "dump")[0])
    assert len(set(found[0])) == 4
    for others, dump in zip(found[1:], dumps[1:], strict=True):
        assert others == pytest.approx(found[0], rel=1e-5)
        torch.testing.assert_close(dump.losses, dumps[0].losses, rtol=1e-5, atol=1e-5)
