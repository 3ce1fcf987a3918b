"""Documents that do not see each other: tokens compete within them, and their losses are cached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from by_sorting import top_of_documents
from forked_jobs import Server
from gpt_datasets import gpt_config
from jobs import GLOBAL_BATCH, SEQUENCE, SPLIT, VOCABULARY, Checkpoints, Corpus, write_dataset
from launch import Run
from megatron_slm.data.score_cache import Section
from megatron_slm.data.score_manifest import read_cache_manifest
from megatron_slm.data.scored_dataset import document_scored
from megatron_slm.data.token_dump import read_dumps
from real_text import docstrings

STEPS, MICRO_BATCH = 3, 2
MASKING = "--dataloader-inter-document-masking"
RUN = f"""
    --train-iters {STEPS} --global-batch-size {GLOBAL_BATCH} --micro-batch-size {MICRO_BATCH}
    --eval-iters 1 --eval-interval 1000
"""
SELECTING = "--slm-token-ratio 0.6 --slm-scope document"
TAGS = ("lm loss", "reference loss", "excess loss", "threshold", "selected ratio", "grad-norm")


@dataclass
class Caches:
    """Of the same reference, in float32."""

    by_sample: Path
    by_document: Path


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of which most fit a sample: the lines of real texts, and a few whole texts."""
    texts = docstrings(["statistics"])
    lines = [line.strip()[:50] for text in texts for line in text.splitlines() if line.strip()]
    prefix = tmp_path_factory.mktemp("short") / "lines"
    write_dataset(prefix, [*lines[:300], *texts[:5]])
    return Corpus(prefix)


@pytest.fixture(scope="module")
def caches(
    short: Corpus, untied: Checkpoints, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Caches:
    made = {}
    for by in ("sample", "document"):
        directory = tmp_path_factory.mktemp(by)
        made[by] = directory / "cache"
        sources = f"--slm-reference-load {untied.reference} --slm-reference-cache {made[by]}"
        extra = f"{RUN} {MASKING} {sources} --by {by} --cache-dtype float32"
        server.run("score", 1, [*short.arguments, *extra.split()], directory / "job")
    return Caches(made["sample"], made["document"])


def arguments(short: Corpus, start: Checkpoints, extra: str) -> list[str]:
    of_run = f"{RUN} {SELECTING} {extra}"
    return [*short.arguments, *start.without_reference, *of_run.split()]


def samples(short: Corpus, kind: Any = GPTDataset, split: int = 0) -> Any:
    """The training samples of the runs, or those of another split."""
    config = gpt_config(
        SEQUENCE,
        VOCABULARY,
        blend=([str(short.prefix)], None),
        split=SPLIT,
        eod_mask_loss=True,
        inter_document_masking=True,
    )
    counts = [STEPS * GLOBAL_BATCH, GLOBAL_BATCH, 0]
    return BlendedMegatronDatasetBuilder(kind, counts, lambda: True, config).build()[split]


def documents_of(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The number of each token's document, counted from where Megatron says they end."""
    places = torch.arange(SEQUENCE)
    return torch.stack([torch.searchsorted(r["cu_seqlens"][1:], places, right=True) for r in rows])


def run(server: Server, ranks: int, arguments: list[str], directory: Path) -> Run:
    more = "--tensorboard-dir tensorboard --num-workers 0".split()
    return Run(directory, server.run("record", ranks, arguments + more, directory), [0] * ranks)


@pytest.fixture(scope="module")
def online(
    short: Corpus, untied: Checkpoints, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Over two context-parallel ranks, with the reference at hand."""
    extra = f"{MASKING} --slm-reference-load {untied.reference} --context-parallel-size 2"
    extra += " --slm-dump-interval 2 --slm-dump-dir dump"
    directory = tmp_path_factory.mktemp("online")
    return run(server, 2, arguments(short, untied, extra), directory)


def test_tokens_compete_within_their_document(short: Corpus, online: Run) -> None:
    """Exactly as a sort of each document's scores has it, over context-parallel ranks."""
    saved = [torch.load(online.directory / "recorded" / f"rank{rank}.pt") for rank in range(2)]
    parts = [sorted(one["records"], key=lambda r: (r["iteration"], r["number"])) for one in saved]
    dataset = samples(short)
    several = 0
    for number, halves in enumerate(zip(*parts, strict=True)):
        first = number * MICRO_BATCH
        rows = [dataset[index] for index in range(first, first + MICRO_BATCH)]
        whole = {}
        for name in ("scores", "selected"):
            chunks = [half[name].chunk(2, dim=1) for half in halves]
            ordered = [chunks[0][0], chunks[1][0], chunks[1][1], chunks[0][1]]
            whole[name] = torch.cat(ordered, dim=1)
        documents = documents_of(rows)
        several += int(documents.max())
        valid = torch.stack([row["loss_mask"] for row in rows]) > 0
        expected = top_of_documents(whole["scores"], valid, documents, [0.6] * MICRO_BATCH)
        assert torch.equal(whole["selected"], expected), number
    assert several > len(parts[0])  # more than two documents a sample, on average


def test_dumps_know_the_documents(short: Corpus, online: Run) -> None:
    """And select within them, as training does."""
    dumps = read_dumps(online.directory / "dump")
    validation = samples(short, split=1)
    rows = [validation[int(number)] for number in dumps[0].samples]
    expected = documents_of(rows)
    for dump in dumps:
        assert dump.about.scope == "document"
        assert np.array_equal(dump.documents, expected.numpy())
        scores = torch.from_numpy(dump.losses - dump.reference_losses)
        chosen = top_of_documents(scores, torch.from_numpy(dump.valid), expected, [0.6] * len(rows))
        assert np.array_equal(dump.selected, chosen.numpy())


def test_cached_is_online(
    short: Corpus, untied: Checkpoints, caches: Caches, online: Run, server: Server, tmp_path: Path
) -> None:
    """In another layout too."""
    extra = f"{MASKING} --slm-reference-cache {caches.by_sample}"
    cached = run(server, 1, arguments(short, untied, extra), tmp_path)
    for tag in TAGS:
        assert len(online.scalars(tag)) == STEPS
        assert cached.scalars(tag) == pytest.approx(online.scalars(tag), rel=2e-5, abs=2e-5), tag


def test_losses_by_document_are_those_by_sample(short: Corpus, caches: Caches) -> None:
    """Of every token that counts in a document that begins in its sample: to rounding."""
    manifests = [read_cache_manifest(path) for path in (caches.by_sample, caches.by_document)]
    assert all(manifest.source.inter_document_masking is True for manifest in manifests)
    by_sample = Section(caches.by_sample, manifests[0], "train")
    name = short.prefix.name
    section = Section(caches.by_document, manifests[1], name)
    scored = samples(short, document_scored({name: section}))
    equal = others = 0
    for number in range(STEPS * GLOBAL_BATCH):
        sample = scored[number]
        expected = by_sample.losses(number, sample["labels"].numpy().astype(np.int32))
        valid = sample["loss_mask"].numpy() > 0
        begun = np.arange(SEQUENCE) >= int(sample["cu_seqlens"][1])  # the first may be cut
        apart = np.abs(sample["reference_losses"].numpy() - expected)
        assert (apart[valid & begun] < 2e-5).all(), number
        equal += (valid & begun).sum()
        others += (valid & ~begun).sum()
    assert equal > others


@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_of_another_attention(
    masked: bool,
    short: Corpus,
    untied: Checkpoints,
    caches: Caches,
    server: Server,
    tmp_path: Path,
) -> None:
    """Is refused, whichever of the run and the cache masks."""
    cache = caches.by_document
    if masked:  # as older versions wrote it
        manifest = json.loads((cache / "manifest.json").read_text())
        del manifest["source"]["inter_document_masking"]
        cache = tmp_path / "cache"
        cache.mkdir()
        (cache / "manifest.json").write_text(json.dumps(manifest))
    extra = f"--slm-scope sequence --slm-reference-cache {cache} {MASKING if masked else ''}"
    server.start("train", 1, arguments(short, untied, extra), tmp_path / "run")
    assert server.codes() == [2]
    said = (tmp_path / "run" / "rank0.log").read_text()
    has, wants = ("without", "with") if masked else ("with", "without")
    assert f"was scored {has} {MASKING}, and this run is {wants} it" in said
