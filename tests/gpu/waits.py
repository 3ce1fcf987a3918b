"""Where a training step at 1.1 billion parameters waits for the GPU, and how much of it is idle.

python tests/gpu/waits.py
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from table import arguments, row, skipped

args = arguments(__doc__)

from training import BILLION, save_reference, train

MICRO_BATCHES = 4
# As docs/design.md has them, with one reference and one scope.
EXPECTED = {"ours: objective.py found": MICRO_BATCHES}


def main() -> None:
    """One run, of which a step is watched and the next profiled."""
    if args.device == "cpu":
        skipped("waits of a step", "a GPU tells of them; on CPUs tests/training/test_waits.py does")
        return
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        save_reference(at)
        slm = f"--train-iters 6 --slm-token-ratio 0.6 --slm-reference-load {at}/reference"
        said = train(at / "run", f"{BILLION} {slm}", module="watched_step").outputs[0]
    found = re.findall(r"^wait (\d+) (.*)", said, re.MULTILINE)
    for where, number in sorted((where, int(number)) for number, where in found):
        if where.startswith("ours"):
            right = number == EXPECTED.get(where)
            row(f"waits of a step, {where}", str(number), str(EXPECTED.get(where, 0)), right)
        else:
            row(f"waits of a step, {where}", str(number))
    profiles = re.search(r"^profile (\d+) (\d+) (\d+)", said, re.MULTILINE)
    assert profiles is not None, said[-2000:]
    kernels, busy, span = map(int, profiles.groups())
    row(f"kernels and copies of a step of {MICRO_BATCHES} micro-batches", str(kernels))
    row("idle share of a step", f"{1 - busy / span:.1%} of {span / 1000:.0f} ms")


if __name__ == "__main__":
    main()
