"""What a user's own score and weighting read in runs, with values from files and tokens left out.

One run has context and tensor parallelism and a reference at hand, the other has a pipeline and
cached losses.  Both have packed documents of a blend.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from corpus import run_tool
from forked_jobs import Server
from gpt_datasets import gpt_config
from jobs import SEQUENCE, SPLIT, VOCABULARY, Checkpoints, write_dataset
from megatron_slm.data.token_dump import read_dumps
from megatron_slm.selection import kept_by_goldfish
from real_text import docstrings

STEPS, MICRO_BATCH, COUNT = 2, 2, 2
SAMPLES = STEPS * COUNT * MICRO_BATCH
READ = (
    "entropies top_entropies reference_losses labels token_ids positions documents "
    "document_positions datasets external random"
).split()
PUBLISHED = ("eaft", "talr", "exact")  # weights that read what no run of test_methods.py has
GOLDFISH = (3, 4)
BELOW, ABOVE = 15_000, 100_000  # the first and the last documents
MODULE = f"""
from pathlib import Path

import torch
from megatron_slm.selection import token_score, token_weight
from megatron_slm.selection.weights import WEIGHT_FUNCTIONS

seen = []

@token_score(needs={READ})
def everything(tokens):
    Path("seen").mkdir(exist_ok=True)
    torch.save(tokens.known(), f"seen/{{torch.distributed.get_rank()}} {{len(seen)}}.pt")
    seen.append(tokens)
    return tokens.losses - tokens.reference_losses + tokens.random

@token_weight(needs={READ})
def late(tokens, chosen, *, power=1.0):
    found = {{name: WEIGHT_FUNCTIONS[name].compute(tokens, chosen) for name in {PUBLISHED}}}
    torch.save(found, f"seen/{{torch.distributed.get_rank()}} {{len(seen) - 1}} weights.pt")
    return chosen.normalized((1.0 + tokens.positions) ** power)

@token_score()
def differs(tokens):
    return tokens.losses + torch.distributed.get_rank()
"""


@dataclass
class Blend:
    """Two datasets, their texts, and the arguments of runs that read them and values for them."""

    prefixes: list[Path]
    texts: list[list[str]]
    values: list[Path]

    @property
    def arguments(self) -> list[str]:
        return (
            f"--data-path 0.5 {self.prefixes[0]} 0.5 {self.prefixes[1]} --split {SPLIT} "
            f"--seq-length {SEQUENCE} --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
            "--eod-mask-loss --dataloader-inter-document-masking --num-workers 0 "
            f"--train-iters {STEPS} --global-batch-size {COUNT * MICRO_BATCH} "
            f"--micro-batch-size {MICRO_BATCH} --eval-iters 1 --eval-interval 1000"
        ).split()

    def built(self) -> list[dict[str, Tensor]]:
        """The training samples, by Megatron's own builder."""
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset

        config = gpt_config(
            SEQUENCE,
            VOCABULARY,
            blend=([str(prefix) for prefix in self.prefixes], [0.5, 0.5]),
            split=SPLIT,
            eod_mask_loss=True,
            inter_document_masking=True,
        )
        counts = [SAMPLES, COUNT * MICRO_BATCH, 0]
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, counts, lambda: True, config).build()[0]
        return [dataset[number] for number in range(SAMPLES)]


def kept(document: int, place: int) -> bool:
    """Whether the mask of the values keeps a token."""
    return (document + place) % 7 != 3


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Blend:
    """Values say where a token is: 1000 times the number of its document, and its place there."""
    where = tmp_path_factory.mktemp("blend")
    texts, prefixes, values = [], [], []
    for name, module in (("prose", "statistics"), ("code", "argparse")):
        lines = [line.strip()[:50] for text in docstrings([module]) for line in text.splitlines()]
        own = [*[line for line in lines if line][:130], *docstrings([module])[:3]]
        own = [text[:900] for text in own]
        prefix = where / name
        write_dataset(prefix, own)
        texts.append(own)
        prefixes.append(prefix)
        for kind in ("external", "mask"):
            records = [
                [1000 * d + t if kind == "external" else int(kept(d, t)) for t in range(length)]
                for d, length in enumerate(len(text.encode()) + 1 for text in own)
            ]
            file, cache = where / f"{name}-{kind}.jsonl", where / f"{name}-{kind}"
            file.write_text("".join(json.dumps({"values": row}) + "\n" for row in records))
            tokenizer = f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY}".split()
            options = ["--as", kind, "--data-path", prefix, *tokenizer, "--seq-length", SEQUENCE]
            result = run_tool("import_scores", file, *options, "--slm-reference-cache", cache)
            assert result.code == 0, result.err
            values.append(cache)
    return Blend(prefixes, texts, values)


@dataclass
class Seen:
    """What the functions of a run read and did: whole samples, [SAMPLES, s], by name."""

    read: dict[str, Tensor]
    published: dict[str, Tensor]
    selected: Tensor
    weights: Tensor
    dump: Path


def whole(parts: list[Tensor]) -> Tensor:
    """Join the parts of context-parallel ranks."""
    if len(parts) == 1:
        return parts[0]
    halves = [part.chunk(2, dim=1) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves[::-1]], dim=1)


def seen_by(directory: Path, ranks: list[list[int]]) -> Seen:
    """Collect what was seen by ranks; those of one list hold parts of the same samples, and each
    list holds the same as the others."""
    found = []
    for of_parts in ranks:
        batches: list[dict[str, Tensor]] = []
        for number in range(STEPS * COUNT):
            # What they read first was of the token dump.
            files = [directory / "seen" / f"{rank} {number + 1}.pt" for rank in of_parts]
            read = [
                torch.load(file) | torch.load(file.with_name(f"{file.stem} weights.pt"))
                for file in files
            ]
            saved = [torch.load(directory / "recorded" / f"rank{rank}.pt") for rank in of_parts]
            records = [one["records"][number] for one in saved]
            assert {record["number"] for record in records} == {number % COUNT}
            parts = [
                one | {name: record[name] for name in ("selected", "weights")}
                for one, record in zip(read, records, strict=True)
            ]
            batches.append({name: whole([part[name] for part in parts]) for name in parts[0]})
        found.append({name: torch.cat([one[name] for one in batches]) for name in batches[0]})
    for other in found[1:]:  # tensor-parallel ranks agree to the bit
        assert all(torch.equal(other[name], values) for name, values in found[0].items())
    selected, weights = found[0].pop("selected"), found[0].pop("weights")
    published = {name: found[0].pop(name) for name in PUBLISHED}
    return Seen(found[0], published, selected, weights, directory / "dump")


@pytest.fixture(scope="module")
def runs(
    blend: Blend, untied: Checkpoints, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> list[Seen]:
    where = tmp_path_factory.mktemp("runs")
    cache = where / "cache"
    reference = f"--slm-reference-load {untied.reference}".split()
    base = [*untied.without_reference, *blend.arguments]
    scoring = f"--slm-reference-cache {cache} --by sample --cache-dtype float32".split()
    server.run("score", 1, [*base, *reference, *scoring], where / "job")
    functions = (
        "--slm-score own:everything --slm-weighting own:late --slm-score-option power=2 "
        f"--slm-token-ratio 0.5 --slm-leave-out goldfish={GOLDFISH[0]}:{GOLDFISH[1]} "
        f"above={ABOVE} below={BELOW} --slm-dump-interval {STEPS} --slm-dump-dir dump "
        "--slm-dump-samples 2 --slm-token-values"
    )
    done = []
    for number, (ranks, layout, last) in enumerate(
        [
            (
                4,
                [*"--tensor-model-parallel-size 2 --context-parallel-size 2".split(), *reference],
                [[0, 2], [1, 3]],
            ),
            (2, f"--pipeline-model-parallel-size 2 --slm-reference-cache {cache}".split(), [[1]]),
        ]
    ):
        directory = where / str(number)
        directory.mkdir()
        (directory / "own.py").write_text(MODULE)
        arguments = [*base, *functions.split(), *map(str, blend.values), *layout]
        server.run("record", ranks, arguments, directory)
        done.append(seen_by(directory, last))
    return done


def test_they_read_the_same_in_each_layout(runs: list[Seen]) -> None:
    one, other = (run.read for run in runs)
    assert one.keys() == other.keys() == {*READ, "losses", "valid"}
    valid = one["valid"]
    for name, values in one.items():
        if name in ("losses", "entropies", "top_entropies", "reference_losses"):
            torch.testing.assert_close(values[valid], other[name][valid], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(values, other[name]), name
    assert torch.equal(runs[0].selected, runs[1].selected)
    torch.testing.assert_close(runs[0].weights, runs[1].weights, rtol=1e-5, atol=1e-5)


def test_they_read_what_the_samples_have(runs: list[Seen], blend: Blend) -> None:
    read = runs[0].read
    places = torch.arange(SEQUENCE)
    for number, sample in enumerate(blend.built()):
        row = {name: values[number] for name, values in read.items()}
        assert torch.equal(row["token_ids"], sample["tokens"])
        assert torch.equal(row["labels"], sample["labels"])
        assert torch.equal(row["positions"], places)
        assert (row["datasets"] == sample["dataset_id"]).all()
        ends = sample["cu_seqlens"].unique()
        of = torch.searchsorted(ends, places, right=True) - 1
        assert torch.equal(row["documents"], of)
        assert torch.equal(row["document_positions"], places - ends[of])
    drawn = read["random"]
    assert ((drawn >= 0) & (drawn < 1)).all() and drawn.unique().numel() > 0.99 * drawn.numel()


def test_values_are_those_of_their_tokens(runs: list[Seen], blend: Blend) -> None:
    """Of the files' values, the place that each names has the token."""
    read, samples = runs[0].read, blend.built()
    count = 0
    for number, sample in enumerate(samples):
        texts = blend.texts[int(sample["dataset_id"])]
        for place in (sample["loss_mask"] > 0).nonzero().flatten().tolist():
            document, at = divmod(int(read["external"][number, place]), 1000)
            ids = [*texts[document].encode(), VOCABULARY - 1]
            assert ids[at] == sample["labels"][place]
            count += document > 0
    assert count > SAMPLES * SEQUENCE / 2


def test_tokens_are_left_out(runs: list[Seen], blend: Blend) -> None:
    """By the mask, by values above a limit, and by a hash that no other document takes part in."""
    left_out = np.zeros(4, int)
    for number, sample in enumerate(blend.built()):
        external = runs[0].read["external"][number]
        may = sample["loss_mask"] > 0
        places = [divmod(int(value), 1000) for value in external.tolist()]
        by_mask = torch.tensor([kept(*place) for place in places])
        by_hash = torch.ones(SEQUENCE, dtype=torch.bool)
        for start, stop in itertools.pairwise(sample["cu_seqlens"].unique().tolist()):
            if stop - start >= GOLDFISH[1]:
                part = sample["labels"][None, start:stop]
                by_hash[start:stop] = kept_by_goldfish(part, *GOLDFISH)[0]
        ways = torch.stack([by_mask, external <= ABOVE, external >= BELOW, by_hash])
        left_out += (may & ~ways).sum(1).numpy()
        assert torch.equal(runs[0].read["valid"][number], may & ways.all(0))
    assert (left_out > 5).all(), left_out


def test_the_weighting(runs: list[Seen]) -> None:
    """The later half of each micro-batch's scores, weighed by the square of their place."""
    read, places = runs[0].read, torch.arange(SEQUENCE)
    scores = read["losses"] - read["reference_losses"] + read["random"]
    for first in range(0, SAMPLES, MICRO_BATCH):
        part = slice(first, first + MICRO_BATCH)
        valid, selected = read["valid"][part], runs[0].selected[part]
        count = int(valid.sum() / 2 + 0.5)
        lowest = scores[part][valid].sort().values[-count]
        assert torch.equal(selected, valid & (scores[part] >= lowest))
        raw = selected * (1.0 + places) ** 2
        found = runs[0].weights[part]
        torch.testing.assert_close(found, raw * count / raw.sum(), rtol=1e-5, atol=1e-6)


def test_published_weights(runs: list[Seen]) -> None:
    """Those of the selected tokens, whose samples lie on one rank or on two."""
    buckets = []
    for run, first in itertools.product(runs, range(0, SAMPLES, MICRO_BATCH)):
        part = slice(first, first + MICRO_BATCH)
        read = {name: values[part].double() for name, values in run.read.items()}
        selected = run.selected[part]
        means = [row[own].mean() for row, own in zip(read["losses"], selected, strict=True)]
        context = (read["document_positions"] + 1).clamp(max=SEQUENCE - 1)
        starts = torch.where(context < 8, 0.0, 2.0 ** context.log2().floor())
        long = selected & (starts >= SEQUENCE / 4)
        rarity = torch.zeros_like(context)
        for start in starts[long].unique():
            own = long & (starts == start)
            rarity[own] = (own.sum() / long.sum()) ** -0.5
        wanted = {
            "eaft": read["top_entropies"] / 3.0,
            "talr": (-read["losses"] / min(means)).exp().clamp(min=0.01),
            "exact": 1.0 + 0.15 * rarity / rarity[long].mean(),
        }
        buckets.append(starts[long].unique().numel())
        for name, values in wanted.items():
            found = run.published[name][part].double()
            torch.testing.assert_close(found[selected], values[selected], rtol=1e-5, atol=1e-6)
    assert min(buckets) > 0 and max(buckets) == 2


def test_token_dumps(runs: list[Seen]) -> None:
    """Of validation samples, of which no token is left out."""
    for dumps in zip(*(read_dumps(run.dump) for run in runs), strict=True):
        for dump in dumps:
            assert dump.selected.sum() == int(dump.valid.sum() / 2 + 0.5)
            assert np.array_equal(dump.selected, dumps[0].selected)


def test_a_function_that_differs_between_ranks(
    blend: Blend, untied: Checkpoints, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(MODULE)
    layout = "--tensor-model-parallel-size 2 --slm-score own:differs --slm-token-ratio 0.5"
    arguments = [*untied.without_reference, *blend.arguments, *layout.split()]
    server.start("train", 2, arguments, tmp_path)
    assert server.codes() == [2, 2]
    outputs = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    said = {line for line in outputs.splitlines() if line.startswith("error: ")}
    assert said == {
        "error: --slm-score own:differs returned other values on one tensor-parallel rank than on "
        "another: it has to be a function of its arguments alone; for chance, take tokens.random"
    }
    assert "Traceback" not in outputs
