"""Run the checks of this directory, each in a process of its own, and print their table.

exactness  losses, gradients and selection against float64 and a sort; attention's kernel
losses     training on this device, and over several ranks, against training on the CPU
head       time and memory of the selective head beside its peers
steps      seconds a step at 1.1B parameters: SLM against CLM
waits      of a training step: waits for the device, kernels, idle share
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = {"exactness": 80, "losses": 250, "head": 80, "steps": 380, "waits": 110}  # at most
PACKAGES = "torch triton megatron-core transformer-engine apex nvidia-nccl-cu13".split()


def describe(device: str) -> Iterator[tuple[str, str]]:
    """Name the hardware and the versions that the figures are of."""
    import torch

    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield "device", f"{torch.cuda.device_count()} x {properties.name}, {memory}"
        yield "CUDA", f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    else:
        yield "device", f"CPU, {os.cpu_count()} cores"
    yield "Python", sys.version.split()[0]
    off = os.getenv("TORCHDYNAMO_DISABLE") == "1" or device == "cpu"
    yield "torch.compile, of Megatron's fusions", "off" if off else "on"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def run(check: str, options: list[str]) -> tuple[list[str], bool]:
    """Run a check; the lines of its table, and whether all are right."""
    from table import MARK, WRONG, row

    start = time.monotonic()
    limit = SECONDS[check] * (2 if "cpu" in options else 1)
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"{check}.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"CHECK_ENDS": str(time.time() + limit - 5)},
    )
    try:
        said, code = process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired as late:
        process.terminate()  # it ends the ranks that it has started, which would compute on
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        said, code = (late.output or b"").decode(errors="replace"), 124
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    right = code == 0 and not any(line.endswith(f"| {WRONG} |") for line in lines)
    print(*lines, sep="\n", flush=True)
    if not right:
        print(*[line for line in said.splitlines() if not line.startswith(MARK)][-60:], sep="\n")
    if code != 0:
        why = f"took over {limit} s" if code == 124 else f"ended with {code}"
        row(check, why, "", False)
    row(f"{check}: time", f"{time.monotonic() - start:.0f} s")
    return lines, right


def main() -> int:
    """Print the table; 1 if something in it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS))
    args = parser.parse_args()
    print("| what | figure | aim | |\n|---|---|---|---|")
    for name, value in describe(args.device):
        print(f"| {name} | {value} | | |")
    options = ["--device", args.device, *(["--small"] if args.small else [])]
    results = [run(check, options) for check in args.only]
    wrong = sum(not right for _, right in results)
    print(f"{wrong} of {len(results)} checks failed" if wrong else "all is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
