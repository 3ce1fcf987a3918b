"""Seconds a step at 1.1 billion parameters, bfloat16: SLM in its forms against CLM.

python tests/gpu/steps.py
"""

from __future__ import annotations

import re
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

from table import arguments, attempt, measured, row, skipped

args = arguments(__doc__)

from training import BILLION, save_reference, train

RATIO = "--slm-token-ratio 0.6"
TOKENS = 16 * 2048
# More arguments, and the aim as a multiple of the time that CLM takes.
ROWS: dict[str, tuple[str, float | None]] = {
    "CLM": ("", None),
    "SLM": (f"{RATIO} --slm-reference-load REFERENCE", 1.34),
    "SLM, nothing spent on a reference (as with cached losses)": (
        f"{RATIO} --slm-score policy",
        1.0,
    ),
    "SLM, the reference in host memory, 4 micro-batches at once": (
        f"{RATIO} --slm-reference-load REFERENCE --slm-reference-offload"
        " --slm-reference-micro-batch-size 16",
        1.34,
    ),
    "SLM, dense head": (f"{RATIO} --slm-reference-load REFERENCE --slm-head dense", None),
}


def rows() -> dict[str, tuple[str, float | None]]:
    """Return ROWS, and a reference in fp8 where it can be computed."""
    import torch

    name = "SLM, the reference in fp8"
    if find_spec("transformer_engine") is None:
        skipped(f"1.1B, {name}", "Transformer Engine is not installed")
    elif torch.cuda.get_device_capability() < (8, 9):
        skipped(f"1.1B, {name}", "this GPU has no fp8")
    else:
        return ROWS | {name: (f"{ROWS['SLM'][0]} --slm-reference-fp8", 1.34)}
    return ROWS


def main() -> None:
    """Each row twelve steps, of which the first three are passed over."""
    if args.device == "cpu" or args.small:
        skipped("seconds a step", "a billion parameters are for a GPU")
        return
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        save_reference(at)
        for number, (name, (more, aim)) in enumerate(rows().items()):
            with attempt(f"1.1B, {name}: a step"):
                run = train(
                    at / f"run{number}",
                    f"{BILLION} --train-iters 12 {more.replace('REFERENCE', f'{at}/reference')}",
                )
                found[name] = tell(name, run.outputs[0], aim, found.get("CLM"))


def tell(name: str, said: str, aim: float | None, clm: float | None) -> float:
    """Print a row's figures from what its run said; return its milliseconds a step.

    Args:
        name: the row.
        said: what the run's first rank printed.
        aim: the aim, as a multiple of CLM's milliseconds.
        clm: these; None if they are not known.
    """
    times = [
        float(each) for each in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", said)
    ][3:]
    peaks = [float(each) for each in re.findall(r"max allocated: ([0-9.]+)", said)]
    step = statistics.median(times)
    share = f", {step / clm:.2f} of CLM" if clm else ""
    figure = f"{step:.0f} ms ({min(times):.0f} to {max(times):.0f}){share}"
    row(f"1.1B, {name}: GiB at most", f"{max(peaks, default=0) / 1024:.1f}")
    row(f"1.1B, {name}: tokens a second", f"{1000 * TOKENS / step:.0f}")
    if aim is None or clm is None:
        row(f"1.1B, {name}: a step", figure)
    else:
        measured(f"1.1B, {name}: a step", figure, f"{aim:.2f}", step / clm <= aim)
    return step


if __name__ == "__main__":
    main()
