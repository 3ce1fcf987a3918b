"""LongPPL of score caches, against its definition token by token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from msgspec import UNSET
from numpy.typing import NDArray

from megatron_slm.analysis.long_perplexity import longppl, perplexity
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import write_shard
from megatron_slm.data.score_manifest import CacheManifest
from megatron_slm.data.scored_dataset import DocumentWindows, dataset_fingerprint
from megatron_slm.errors import UserError

TOKENS, EOD, LONG, SHORT = 6000, 6000, 64, 16


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths whose tokens are their own positions in the file."""
    prefix = tmp_path_factory.mktemp("data") / "web"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for part in torch.arange(TOKENS).split([20, 3, 200, 97, 600, 1, 1079, 4000]):
        builder.add_document(part, [len(part)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_cache(
    directory: Path, prefix: Path, length: int, apart: bool, losses: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Write the cache of a model with these losses; return how many tokens it saw before each."""
    windows = DocumentWindows(IndexedDataset(str(prefix)), length, EOD, apart)
    samples = [windows[number] for number in range(len(windows))]
    labels = np.stack([sample["labels"].numpy() for sample in samples]).astype(np.int32)
    source = ScoredData(
        "tokenizer", EOD + 1, {"web": dataset_fingerprint(str(prefix))}, True if apart else UNSET
    )
    model = {"model": directory.name.partition("-")[0]}
    manifest = CacheManifest("document", "float32", length, 50, {"web": len(labels)}, source, model)
    manifest.write(directory)
    for shard in range(manifest.shards("web")):
        part = labels[manifest.records_of("web", shard)]
        of_part = np.append(losses, np.float32(40))[part]
        write_shard(directory, manifest, "web", shard, of_part, part, np.zeros(len(part), np.int64))
    seen = np.zeros(EOD + 1, np.int64)
    for sample in samples:
        seen[sample["labels"]] = sample["position_ids"] + 1
    return seen[:TOKENS]


@pytest.mark.parametrize("apart", [False, True])
def test_perplexity_of_key_tokens(
    prefix: Path, apart: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(2)
    policy, long, short = (draw.uniform(0, 6, TOKENS).astype(np.float32) for _ in range(3))
    caches = [tmp_path / name for name in ("policy", "evaluator-long", "evaluator-short")]
    write_cache(caches[0], prefix, 48, apart, policy)
    seen_long = write_cache(caches[1], prefix, LONG, apart, long)
    seen_short = write_cache(caches[2], prefix, SHORT, apart, short)
    given = [str(caches[0]), "--evaluator", *map(str, caches[1:]), "--data-path", str(prefix)]

    def table(*more: str) -> list[str]:
        longppl([*given, *more])
        return capsys.readouterr().out.splitlines()[-1].split()

    for more, alpha, beta in (([], 2.0, -2.0), (["--alpha", "1", "--beta", "-0.5"], 1.0, -0.5)):
        of_all, of_key = [], []
        for token in range(TOKENS):
            if seen_short[token] < SHORT / 2 or seen_long[token] <= SHORT:
                continue
            of_all.append(policy[token])
            difference, log_probability = short[token] - long[token], -long[token]
            if difference > alpha and log_probability > beta:
                of_key.append(policy[token])
        name, tokens, ppl, key_tokens, key_ppl = table(*more)
        assert (name, tokens, key_tokens) == ("web", f"{len(of_all):,}", f"{len(of_key):,}")
        assert 50 < len(of_key) < len(of_all) < TOKENS
        assert float(ppl) == pytest.approx(math.exp(np.mean(of_all)), abs=1e-3)
        assert float(key_ppl) == pytest.approx(math.exp(np.mean(of_key)), abs=1e-3)
    assert table("--alpha", "7")[3:] == ["0", "-"]


def test_what_is_refused(prefix: Path, tmp_path: Path) -> None:
    losses = np.ones(TOKENS, np.float32)
    for name, length in (("one-long", LONG), ("one-short", SHORT), ("other-short", SHORT)):
        write_cache(tmp_path / name, prefix, length, False, losses)
    write_cache(tmp_path / "one-apart", prefix, SHORT, True, losses)
    elsewhere = tmp_path / "books"
    for kind in ("bin", "idx"):
        elsewhere.with_suffix(f".{kind}").write_bytes(prefix.with_suffix(f".{kind}").read_bytes())
    changed = tmp_path / "web"
    changed.with_suffix(".bin").write_bytes(bytes(4 * TOKENS))
    changed.with_suffix(".idx").write_bytes(prefix.with_suffix(".idx").read_bytes())
    for caches, data, said in (
        ("one-long one-long other-short", prefix, "give two caches of one model"),
        ("one-long one-short one-short", prefix, "no token of web has .*: score LONG"),
        ("one-long one-long one-apart", prefix, "some of these caches were scored with"),
        ("one-long one-long one-short", elsewhere, "has no losses of --data-path"),
        ("one-long one-long one-short", changed, "was scored from other files than"),
    ):
        model, *evaluator = (str(tmp_path / name) for name in caches.split())
        with pytest.raises(UserError, match=said):
            longppl([model, "--evaluator", *evaluator, "--data-path", str(data)])


def test_a_perplexity_beyond_all_numbers() -> None:
    assert [perplexity(0.0, 0), perplexity(5.0, 5), perplexity(4e3, 5)] == ["-", "2.718", "inf"]
