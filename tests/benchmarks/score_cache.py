"""Time that reference losses add to loading a sample.

    python tests/benchmarks/score_cache.py

Samples of 4096 tokens drawn from 20 million in documents of 700 on average, by Megatron's
GPTDataset alone and with losses by sample and by document, one process, in turn.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import DType, _IndexWriter

from gpt_datasets import gpt_config
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import Section, write_shard
from megatron_slm.data.score_manifest import CacheManifest
from megatron_slm.data.scored_dataset import SampleScored, document_scored

LENGTH, VOCABULARY, TOKENS, SAMPLES, ROUNDS = 4096, 32000, 20_000_000, 2000, 5


def write_dataset(prefix: str) -> None:
    """Random tokens in documents of geometrically distributed lengths."""
    draw = np.random.default_rng(1)
    lengths = draw.geometric(1 / 700, TOKENS // 700).astype(np.int32)
    draw.integers(0, VOCABULARY, lengths.sum(), dtype=np.uint16).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", DType.optimal_dtype(VOCABULARY)) as writer:
        writer.write(lengths.tolist(), None, list(range(len(lengths) + 1)))


def build(prefix: str, kind: Any) -> Any:
    """Training samples in Megatron's order."""
    config = gpt_config(LENGTH, VOCABULARY, random_seed=5, blend=([prefix], None))
    builder = BlendedMegatronDatasetBuilder(kind, [SAMPLES, 0, 0], lambda: True, config)
    return builder.build()[0]


def write_cache(directory: Path, kind: Any, name: str, labels: np.ndarray) -> Section:
    """Losses that mean nothing, for these labels [records, s]."""
    source = ScoredData("t", 1 << 16, {"random": {}}, blends={})
    manifest = CacheManifest(kind, "uint16", LENGTH, 2048, {name: len(labels)}, source, {})
    manifest.write(directory)
    for shard in range(manifest.shards(name)):
        part = labels[manifest.records_of(name, shard)]
        losses = (part % 100 / 10).astype(np.float32)
        write_shard(directory, manifest, name, shard, losses, part, np.zeros(len(part), np.int64))
    return Section(directory, manifest, name)


def main() -> None:
    """Print microseconds a sample."""
    with tempfile.TemporaryDirectory() as scratch:
        prefix = f"{scratch}/random"
        write_dataset(prefix)
        plain = build(prefix, GPTDataset)
        labels = np.stack([plain[i]["labels"].numpy() for i in range(SAMPLES)]).astype(np.int32)
        by_sample = write_cache(Path(scratch) / "sample", "sample", "train", labels)
        stream = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int32)
        windows = np.resize(stream, (-(-stream.size // LENGTH), LENGTH))
        section = write_cache(Path(scratch) / "document", "document", "random", windows)
        datasets = {
            "plain": plain,
            "by sample": SampleScored(plain, by_sample),
            "by document": build(prefix, document_scored({"random": section})),
        }
        times: dict[str, list[float]] = {name: [] for name in datasets}
        for _ in range(ROUNDS):
            for name, dataset in datasets.items():
                start = time.perf_counter()
                for index in range(SAMPLES):
                    dataset[index]
                times[name].append((time.perf_counter() - start) / SAMPLES * 1e6)
    baseline = statistics.median(times["plain"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:12} {median:7.1f} us a sample, {median - baseline:+7.1f}")


if __name__ == "__main__":
    main()
