"""Time of a step in which documents do not see each other over that of one in which they do.

    python tests/benchmarks/documents.py [-- more arguments for Megatron]

Both train on the same tokens with the plain layers; lengths of documents are exponential, 256
tokens on average, in samples of 1024.  The third arm also selects tokens, within their documents,
over the same with scope micro-batch.  Runs alternate; each round is a process of its own and gives
the median of its steps without the first two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launch import pretrain

VOCABULARY, MEAN, TOKENS = 31999, 256, 100_000
MODEL = f"""
    --num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 1024
    --max-position-embeddings 1024 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --split 100,0,0
    --micro-batch-size 1 --global-batch-size 1 --train-iters 8 --lr 1e-4 --lr-decay-style constant
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --log-timers-to-tensorboard
""".split()
MASKING = "--dataloader-inter-document-masking"
SELECTING = "--slm-score policy --slm-token-ratio 0.6 --slm-scope"
ARMS = {
    "CLM": "",
    "CLM, masking": MASKING,
    "SLM, scope micro-batch, masking": f"{MASKING} {SELECTING} micro-batch",
    "SLM, scope document, masking": f"{MASKING} {SELECTING} document",
}


def write_documents(prefix: Path) -> None:
    """Write documents of random tokens and exponential lengths."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draw = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    written = 0
    while written < TOKENS:
        tokens = draw.integers(0, VOCABULARY, 1 + int(draw.exponential(MEAN)))
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        written += len(tokens)
    builder.finalize(f"{prefix}.idx")


def main() -> None:
    """Print each arm's step times, and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "documents"
        write_documents(data)
        for number in range(args.rounds):
            for name, extra in ARMS.items():
                run = pretrain(
                    1,
                    [*MODEL, "--data-path", str(data), *extra.split(), *args.arguments],
                    Path(scratch) / f"{name}{number}".replace(" ", "-"),
                    timeout=3600,
                    fresh_threads=args.threads,
                )
                steps = list(run.scalars("iteration-time").values())[1:]
                times[name].append(statistics.median(steps))
    for name, values in times.items():
        print(
            f"{name:32} {statistics.median(values):7.3f} s a step "
            f"({min(values):.3f} to {max(values):.3f})"
        )
    (seeing, masked, wide, narrow) = times.values()
    for name, above, below in (("masking / without", masked, seeing), ("document", narrow, wide)):
        ratios = [one / other for one, other in zip(above, below, strict=True)]
        print(
            f"{name}: {statistics.median(above) / statistics.median(below):.3f}, pairs "
            f"{min(ratios):.3f} to {max(ratios):.3f}; fastest {min(above) / min(below):.3f}"
        )


if __name__ == "__main__":
    main()
