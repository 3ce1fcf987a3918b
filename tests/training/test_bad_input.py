"""Bad input is refused before the first step: a message that says what to do, exit code 2, on
every rank, without waiting for another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import GLOBAL_BATCH, STEPS, Checkpoints, Corpus, write_dataset
from launch import REPOSITORY, SUPPORT, launch, pretrain
from megatron_slm.corpus.preprocessing.preprocess import preprocess
from megatron_slm.corpus.preprocessing.settings import PreprocessingSettings
from real_text import docstrings


def _sentencepiece(reference: Path) -> list[str]:
    """Another tokenizer with as many tokens."""
    import sentencepiece

    model = reference.parent / f"{reference.name}-tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(docstrings(["argparse", "difflib"])),
        model_prefix=str(model),
        vocab_size=257,
        model_type="bpe",
        minloglevel=2,
    )
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{model}.model"]


NO_REFERENCE = "ratio without reference"


def _missing(reference: Path) -> list[str]:
    shutil.rmtree(reference)
    return []


def _no_tracker(reference: Path) -> list[str]:
    (reference / "latest_checkpointed_iteration.txt").unlink()
    return []


def _truncated(reference: Path) -> list[str]:
    file = reference / "iter_0000010" / "__0_0.distcp"
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size // 2)
    return []


def _part_missing(reference: Path) -> list[str]:
    (reference / "iter_0000010" / "__0_0.distcp").unlink()
    return []


def _no_metadata(reference: Path) -> list[str]:
    (reference / "iter_0000010" / ".metadata").unlink()
    return []


def _damaged_metadata(reference: Path) -> list[str]:
    (reference / "iter_0000010" / ".metadata").write_bytes(b"not a checkpoint")
    return []


def _truncated_data(reference: Path) -> list[str]:
    prefix = reference.parent / f"{reference.name}-data"
    write_dataset(prefix, docstrings(["argparse"]))
    with Path(f"{prefix}.bin").open("r+b") as data:
        data.truncate(1000)
    return ["--data-path", str(prefix)]


def _data_of_another_tokenizer(reference: Path) -> list[str]:
    """With as many tokens, by the manifest."""
    arguments = _sentencepiece(reference)
    prefix = reference.parent / f"{reference.name}-other"
    source = Path(f"{prefix}.jsonl")
    source.write_text(json.dumps({"text": " ".join(docstrings(["argparse"]))}))
    preprocess(
        PreprocessingSettings((str(source),), str(prefix), arguments[-1], engine="sentencepiece")
    )
    manifest = Path(f"{prefix}_text_document.manifest.json")
    digest = json.loads(manifest.read_text())["options"]["tokenizer"]["sha256"]
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    return [*arguments, "--data-path", f"{prefix}_text_document"]


CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "reference directory missing": (_missing, "no such directory"),
    "tracker missing": (_no_tracker, "--slm-reference-ckpt-step"),
    "reference truncated": (_truncated, "truncated"),
    "part of the reference missing": (_part_missing, "is missing"),
    "metadata missing": (_no_metadata, "torch_dist"),
    "metadata damaged": (_damaged_metadata, "damaged"),
    "dataset truncated": (_truncated_data, "it is truncated, or the two are not of the same"),
    "dataset of another tokenizer": (
        _data_of_another_tokenizer,
        "-other_text_document was made with another tokenizer than this run's",
    ),
    "no such dataset": (lambda _: ["--data-path", "absent"], "cannot read absent.idx"),
    "no such iteration": (lambda _: ["--slm-reference-ckpt-step", "7"], "iter_0000007"),
    "another vocabulary": (lambda _: ["--vocab-size", "300"], "vocabulary of 257"),
    "another tokenizer": (lambda _: ["--null-tokenizer-eod-id", "3"], "another tokenizer"),
    NO_REFERENCE: (lambda _: [], "give its checkpoint with --slm-reference-load"),
    "schedule without its end": (
        lambda _: ["--slm-ratio-schedule", "linear"],
        "--slm-final-token-ratio",
    ),
    "steps that are none": (
        lambda _: ["--slm-ratio-schedule", "steps", "--slm-ratio-steps", "100=0.5"],
        "--slm-ratio-steps 100=0.5",
    ),
    "steps out of order": (
        lambda _: ["--slm-ratio-schedule", "steps", "--slm-ratio-steps", "9:0.5", "3:0.6"],
        "in the order",
    ),
    "no such domain": (lambda _: ["--slm-domain-ratio", "web=0.5"], "no dataset 'web'"),
    "temperature zero": (lambda _: ["--slm-softmax-temperature", "0"], "above 0"),
    "exact without its scope": (
        lambda _: ["--slm-global-batch", "exact"],
        "--slm-scope global-batch",
    ),
    "a scope that cannot be ranked": (
        lambda _: ["--slm-scope", "global-batch", "--global-batch-size", "48000"],
        "16000 segments",
    ),
    "checkpoints of another format": (lambda _: ["--ckpt-format", "torch"], "needs torch_dist"),
    "entropy from the dense head": (
        lambda _: ["--slm-score", "policy-entropy", "--slm-head", "dense"],
        "--slm-head chunked",
    ),
    "negative guard": (lambda _: ["--slm-unselected-weight", "-1"], "negative"),
    "tokenizer of another kind": (_sentencepiece, "another tokenizer"),
    "ratio zero": (lambda _: ["--slm-token-ratio", "0"], "(0, 1]"),
    "ratio above one": (lambda _: ["--slm-token-ratio", "1.5"], "(0, 1]"),
    "layers do not divide": (
        lambda _: ["--pipeline-model-parallel-size", "4"],
        "has 2 layers",
    ),
    "heads do not divide": (
        lambda _: ["--tensor-model-parallel-size", "4", "--num-query-groups", "4"],
        "has 6 attention heads",
    ),
    "option that cannot be honoured": (
        lambda _: ["--defer-embedding-wgrad-compute"],
        "--defer-embedding-wgrad-compute",
    ),
    "packed documents passed as one sequence": (
        lambda _: [
            *"--dataloader-inter-document-masking --context-parallel-size 2".split(),
            *"--spec one_sequence_layers layers".split(),
        ],
        "--dataloader-inter-document-masking cannot be used with --context-parallel-size 2",
    ),
    "moving average of nothing": (
        lambda _: ["--slm-reference", "ema:1.5"],
        "--slm-reference-load and --slm-reference name a reference each",
    ),
    "reference for a dataset that is none": (
        lambda reference: ["--slm-reference-load", f"web={reference}"],
        "no such directory",
    ),
    "scoring batch that does not fit": (
        lambda _: ["--slm-reference-micro-batch-size", "4"],
        "a multiple of --micro-batch-size",
    ),
    "another rotary base than the checkpoint's": (
        lambda _: ["--rotary-base", "500000"],
        "rotary_base is 10000 there and 500000 here",
    ),
    "another model to start from": (
        lambda reference: ["--load", "absent", "--pretrained-checkpoint", str(reference)],
        "hidden_size is 96 there and 64 here",
    ),
    "a change that is none": (
        lambda _: ["--slm-changed", "rope"],
        "--slm-changed: unknown argument rope",
    ),
    "fp8 without its library": (lambda _: ["--slm-reference-fp8"], "Transformer Engine"),
    "dumps of nowhere": (lambda _: ["--slm-dump-interval", "5"], "--slm-dump-dir or --save"),
    "dumps never": (
        lambda _: ["--slm-dump-interval", "0", "--slm-dump-dir", "dump"],
        "must be at least 1",
    ),
    "multi-token prediction in a scope that is not known before": (
        lambda _: ["--mtp-num-layers", "1", "--slm-scope", "document"],
        "--mtp-num-layers cannot be used with --slm-scope document",
    ),
    "layers without their kernels": (
        lambda _: ["--hybrid-layer-pattern", "M-*-"],
        "layers M (Mamba) need Transformer Engine and mamba-ssm",
    ),
    "positions that rope does not read": (
        lambda _: ["--reset-position-ids"],
        "--reset-position-ids does not reach --position-embedding-type rope",
    ),
    "fp8 that would be float32": (
        lambda _: ["--fp8-format", "hybrid", "--bf16"],
        "--fp8-format needs Transformer Engine",
    ),
    "misspelt option of Megatron's": (
        lambda _: ["--nun-workers", "2"],
        "unrecognized arguments: --nun-workers 2; did you mean --num-workers?",
    ),
    "a number that is none": (lambda _: ["--seed", "x"], "--seed: invalid int value: 'x'"),
    "reset attention mask": (
        lambda _: ["--reset-attention-mask"],
        "--dataloader-inter-document-masking keeps documents apart",
    ),
}


def _manifest_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], list[str]]:
    def spoil(cache: Path) -> list[str]:
        path = cache / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
        return []

    return spoil


def _shard_missing(cache: Path) -> list[str]:
    (cache / "train" / "00002.losses").unlink()
    return []


def _no_manifest(cache: Path) -> list[str]:
    (cache / "manifest.json").unlink()
    return []


def _broken_manifest(cache: Path) -> list[str]:
    (cache / "manifest.json").write_text('{"format": 1, "kind"')
    return []


# Of runs that read a score cache.
CACHES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "cache of another seed": (lambda _: ["--seed", "7"], "seed is 7 here, 1234 there"),
    "cache of another length": (
        lambda _: ["--seq-length", "32"],
        "sequence_length is 32 here, 64 there",
    ),
    "cache of another split": (lambda _: ["--split", "80,20,0"], "split is 80,20,0 here"),
    "cache of other data": (
        _manifest_of(lambda m: m["source"]["datasets"]["docstrings"].update(bin="9 bytes, 0")),
        "datasets.docstrings.bin is",
    ),
    "cache of another tokenizer": (
        _manifest_of(lambda m: m["source"].update(tokenizer="x")),
        "tokenizer is",
    ),
    "cache of another version": (_manifest_of(lambda m: m.update(format=0)), "is of format 0"),
    "shard missing": (_shard_missing, "00002.losses is missing"),
    "no cache": (_no_manifest, "is not a score cache"),
    "manifest broken": (_broken_manifest, "manifest.json cannot be read"),
    "cache without entropies": (
        lambda _: ["--slm-score", "reference-entropy"],
        "a score cache holds losses alone",
    ),
    "offload of a cache": (lambda _: ["--slm-reference-offload"], "--slm-reference-load alone"),
    "order that was not scored": (
        lambda _: ["--dataloader-type", "cyclic"],
        "--dataloader-type cyclic",
    ),
    "several caches of samples": (
        lambda cache: ["--slm-reference-cache", str(cache), str(cache)],
        "--by document",
    ),
}

# Of runs whose reference is the policy's moving average.
AVERAGES = {
    "average that forgets nothing": ("--slm-reference ema:1", "a decay in (0, 1)"),
    "average of another kind": ("--slm-reference sma:0.9", "give ema:DECAY"),
    "average in host memory": ("--slm-reference-offload", "with --slm-reference-offload"),
    "average while weights are gathered": (
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "with --overlap-param-gather",
    ),
    "average of virtual stages": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "with virtual pipeline stages",
    ),
    "average of uneven stages": (
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
        "with stages of different sizes",
    ),
    "average in fp8": ("--slm-reference-fp8", "needs Transformer Engine"),
}


@pytest.fixture(scope="module")
def refusals(
    corpus: Corpus, untied: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[int, str]]]:
    """Exit code and output of two ranks of every case."""
    directory = tmp_path_factory.mktemp("bad-input")
    commands = {}
    scored = directory / "cache"
    run = [*corpus.arguments, *f"--train-iters {STEPS} --micro-batch-size 3".split()]
    run += f"--global-batch-size {GLOBAL_BATCH} --eval-iters 1 --eval-interval 1000".split()
    score = f"--slm-reference-load {untied.reference} --slm-reference-cache {scored}".split()
    launch(1, [str(REPOSITORY / "tools" / "score_reference.py"), *run, *score], directory / "job")
    for number, (case, (spoil, _)) in enumerate(CACHES.items()):
        cache = directory / f"cache{number}"
        shutil.copytree(scored, cache)
        commands[case] = [*untied.without_reference, *run, "--slm-token-ratio", "0.6"]
        commands[case] += ["--slm-reference-cache", str(cache), *spoil(cache)]
    for number, (case, (spoil, _)) in enumerate(CASES.items()):
        reference = directory / f"reference{number}"
        shutil.copytree(untied.reference, reference)
        commands[case] = [
            *corpus.arguments,
            *untied.arguments,
            *f"--train-iters {STEPS} --micro-batch-size 3 --slm-token-ratio 0.6".split(),
            *["--slm-reference-load", str(reference)],
            *spoil(reference),
        ]
    for case, (extra, _) in AVERAGES.items():
        commands[case] = [*untied.without_reference, *run, "--slm-token-ratio", "0.6"]
        commands[case] += f"--save {directory} --save-interval 9".split()
        commands[case] += f"--slm-reference ema:0.9 {extra}".split()
    while "--slm-reference-load" in commands[NO_REFERENCE]:
        at = commands[NO_REFERENCE].index("--slm-reference-load")
        del commands[NO_REFERENCE][at : at + 2]
    (directory / "commands.json").write_text(json.dumps(commands))
    launch(1, [str(SUPPORT / "refused_commands.py")], directory, fresh_threads=1)
    return json.loads((directory / "refusals.json").read_text())


@pytest.mark.parametrize("case", CASES | CACHES | AVERAGES)
def test_refused(case: str, refusals: dict[str, list[tuple[int, str]]]) -> None:
    _, message = (CASES | CACHES | AVERAGES)[case]
    for code, output in refusals[case]:
        assert code == 2, output[-3000:]
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in output


def test_refused_ranks_do_not_wait(corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    """A whole job from the command line: both ranks end, before the first step."""
    arguments = [
        *corpus.arguments,
        *untied.arguments,
        *f"--train-iters {STEPS} --micro-batch-size 3 --slm-token-ratio 2".split(),
    ]
    run = pretrain(2, arguments, tmp_path, check=False, timeout=120, fresh_threads=1)
    assert run.codes == [2, 2], run.outputs[0][-3000:]
    assert "iteration        1/" not in run.outputs[1]
