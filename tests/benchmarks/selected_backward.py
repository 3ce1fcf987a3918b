"""Cost of an SLM step with --slm-backward selected over that of a CLM step.

    python tests/benchmarks/selected_backward.py [--hidden N] [-- more arguments for Megatron]

Both without and with recomputation, at two ratios, with reference losses from a score cache.  The
runs of a round follow each other; each is a process of its own, with one thread, and gives the
median processor time of its steps without the first.  A step has several samples (--samples), since
the optimizer takes much of the time of a single one.  Then, in runs of their own: FLOPs of a step,
counted by torch, which are the floor of its time, and what a step takes of memory beside weights,
gradients and optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from slm_step import MODEL

from launch import REPOSITORY, launch, pretrain

RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BACKWARD = {"SLM all": "all", "SLM selected": "selected"}
STEPS = 3


def variants(ratios: list[float], cache: Path) -> dict[tuple[str, bool], list[str]]:
    """Return what runs by name and whether activations are recomputed."""
    found: dict[tuple[str, bool], list[str]] = {}
    for recomputed in (False, True):
        more = RECOMPUTED.split() if recomputed else []
        found["CLM", recomputed] = more
        for ratio in ratios:
            for name, backward in BACKWARD.items():
                if backward == "selected" or (ratio == ratios[0] and not recomputed):
                    select = f"--slm-token-ratio {ratio} --slm-reference-cache {cache}"
                    own = [*more, *select.split(), "--slm-backward", backward]
                    found[f"{name} {ratio:.0%}", recomputed] = own
    return found


def main() -> None:
    """Print each variant's time, FLOPs and memory, and their ratios to CLM's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2, help="of a step")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.12])
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        length = "--seq-length 1024 --max-position-embeddings 1024"
        size = f"--hidden-size {args.hidden} --global-batch-size {args.samples}"
        own = [*length.split(), *size.split(), *args.arguments]
        common = [*MODEL, *own, "--num-workers", "0"]

        def run(name: str, more: list[str], steps: int = STEPS) -> float:
            arguments = [*common, "--train-iters", str(steps), *more]
            where = directory / name
            pretrain(1, arguments, where, module="timed_pretrain", timeout=3600, fresh_threads=1)
            return statistics.median(json.loads((where / "timed.json").read_text())[1:] or [0.0])

        reference, cache = directory / "reference", directory / "cache"
        run("reference-run", ["--save", str(reference), "--save-interval", "1"], steps=1)
        job = [*common, "--train-iters", str(STEPS), "--slm-reference-load", str(reference)]
        tool = str(REPOSITORY / "tools" / "score_reference.py")
        command = [tool, *job, "--slm-reference-cache", str(cache)]
        launch(1, command, directory / "job", timeout=3600, fresh_threads=1)
        found = variants(args.ratios, cache)
        seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in found}
        for number in range(args.rounds):
            for at, (key, more) in enumerate(found.items()):
                seconds[key].append(run(f"round{number}-{at}", more))
        measured = {}
        for at, (key, more) in enumerate(found.items()):
            arguments = [*common, "--train-iters", "2", *more]
            where = directory / f"measured{at}"
            pretrain(1, arguments, where, module="measured_pretrain", timeout=3600, fresh_threads=1)
            measured[key] = json.loads((where / "measured0.json").read_text())
    for key, times in seconds.items():
        name, recomputed = key
        base = "CLM", recomputed
        paired = [time / clm for time, clm in zip(times, seconds[base], strict=True)]
        flops, moment = (measured[key][what] / measured[base][what] for what in ("flops", "moment"))
        print(
            f"{name:18}{'recomputed' if recomputed else '':12} {statistics.median(times):7.3f} s, "
            f"{statistics.median(paired):.3f} of CLM ({min(paired):.3f} to {max(paired):.3f}); "
            f"FLOPs {flops:.3f}; memory {moment:.3f} ({measured[key]['moment'] >> 20} MiB)"
        )


if __name__ == "__main__":
    main()
