"""Time of an SLM step over that of a CLM step, with a reference of the policy's size.

    python tests/benchmarks/slm_step.py [--cached] [-- more arguments for Megatron]

Floor: a CLM step is a forward and a backward of twice its cost, the reference one forward more:
4/3.  With --cached its losses come from a score cache, and the floor is below 1.  CLM and SLM runs
alternate; each round is a process of its own and gives the median of its steps without the first
two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launch import REPOSITORY, launch, pretrain

MODEL = """
    --num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 512
    --max-position-embeddings 512 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 31999 --mock-data
    --micro-batch-size 1 --global-batch-size 2 --lr 1e-4 --lr-decay-style constant
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --log-timers-to-tensorboard
""".split()
STEPS = 8


def main() -> None:
    """Print each round's step times and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--cached", action="store_true", help="reference losses from a cache")
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        reference = directory / "reference"
        common = [*MODEL, *args.arguments]

        def run(name: str, *arguments: str, steps: int = STEPS) -> float:
            done = pretrain(
                args.ranks,
                [*common, "--train-iters", str(steps), *arguments],
                directory / name,
                timeout=3600,
                fresh_threads=args.threads,
            )
            return statistics.median(list(done.scalars("iteration-time").values())[1:])

        run("reference-run", "--save", str(reference), "--save-interval", "3", steps=3)
        select = ["--slm-token-ratio", "0.6"]
        if args.cached:
            cache = str(directory / "cache")
            job = ["--slm-reference-load", str(reference), "--slm-reference-cache", cache]
            tool = str(REPOSITORY / "tools" / "score_reference.py")
            job = [tool, *common, "--train-iters", str(STEPS), *job]
            launch(args.ranks, job, directory / "job", timeout=3600, fresh_threads=args.threads)
            select += ["--slm-reference-cache", cache]
        else:
            select += ["--slm-reference-load", str(reference)]
        times: dict[str, list[float]] = {"CLM": [], "SLM chunked": [], "SLM dense": []}
        for number in range(args.rounds):
            times["CLM"].append(run(f"clm{number}"))
            times["SLM chunked"].append(run(f"slm{number}", *select))
            times["SLM dense"].append(run(f"dense{number}", *select, "--slm-head", "dense"))
    baseline = statistics.median(times["CLM"])
    for name, values in times.items():
        seconds = statistics.median(values)
        print(
            f"{name:12} {seconds:7.3f} s a step ({min(values):.3f} to {max(values):.3f}), "
            f"{seconds / baseline:.3f} of CLM"
        )


if __name__ == "__main__":
    main()
