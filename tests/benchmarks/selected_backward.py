"""Cost of an SLM step with --slm-backward selected over that of a CLM step.

    python tests/benchmarks/selected_backward.py [--hidden N] [-- more arguments for Megatron]

Both without and with recomputation, at two ratios, with reference losses from a score cache.  The
runs to be compared take turns, step by step, so that what else the machine does is the same for
all: each is a process with one thread, and the processor time of each of its steps but the first is
compared with that of CLM's step of the same round.  A step has several samples (--samples), since
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
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from slm_step import MODEL

from launch import REPOSITORY, Job, launch, pretrain, start

RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BACKWARD = {"SLM all": "all", "SLM selected": "selected"}

Key = tuple[str, bool]  # a variant's name, and whether activations are recomputed


def variants(ratios: list[float], cache: Path) -> dict[Key, list[str]]:
    """Return the arguments of what runs."""
    found: dict[Key, list[str]] = {}
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


def take_turns(
    arguments: dict[Key, list[str]], directory: Path, rounds: int
) -> dict[Key, list[float]]:
    """Return the processor time of each run's steps, in seconds, without the first."""
    command = ["-m", "timed_pretrain", "--tensorboard-dir", "tensorboard"]
    steps = ["--train-iters", str(rounds + 1)]
    jobs: dict[Key, Job] = {}
    seconds: dict[Key, list[float]] = {key: [] for key in arguments}
    for key, own in arguments.items():
        jobs[key] = start(1, [*command, *own, *steps], directory / " ".join(map(str, key)), 1)
        jobs[key].store.set_timeout(timedelta(hours=1))
    for number in range(rounds + 1):
        for key, job in jobs.items():
            job.store.set(f"turn {number}", "")
            seconds[key].append(float(job.store.get(f"took {number}")))
    for job in jobs.values():
        assert job.processes[0].wait() == 0
    return {key: times[1:] for key, times in seconds.items()}


def main() -> None:
    """Print each variant's time, FLOPs and memory, and their ratios to CLM's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
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
        reference, cache = directory / "reference", directory / "cache"
        saved = ["--save", str(reference), "--save-interval", "1", "--train-iters", "1"]
        pretrain(1, [*common, *saved], directory / "reference-run", timeout=3600, fresh_threads=1)
        steps = ["--train-iters", str(args.rounds + 1), "--slm-reference-load", str(reference)]
        tool = str(REPOSITORY / "tools" / "score_reference.py")
        command = [tool, *common, *steps, "--slm-reference-cache", str(cache)]
        launch(1, command, directory / "job", timeout=3600, fresh_threads=1)
        found = {key: [*common, *more] for key, more in variants(args.ratios, cache).items()}
        seconds: dict[Key, list[float]] = {}
        for recomputed in (False, True):
            group = {key: each for key, each in found.items() if key[1] == recomputed}
            seconds |= take_turns(group, directory, args.rounds)
        measured = {}
        for at, (key, each) in enumerate(found.items()):
            arguments = [*each, "--train-iters", "2"]
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
