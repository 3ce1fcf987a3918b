"""Lines of the table that tests/gpu/run.sh prints, and whether what they say is right."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

MARK = "| "


def row(what: str, figure: str, aim: str = "", right: bool | None = None) -> None:
    """Print a figure, and whether it is what it has to be; None where nothing depends on it."""
    verdict = {None: "", True: "ok", False: "WRONG"}[right]
    print(f"{MARK}{what} | {figure} | {aim} | {verdict} |", flush=True)


def skipped(what: str, why: str) -> None:
    """Print that something was not done."""
    print(f"{MARK}{what} | skipped: {why} | | |", flush=True)


def arguments(about: str | None) -> Namespace:
    """Read a check's command line, and prepare the device that it names."""
    parser = ArgumentParser(description=about)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="Sizes for a CPU or a sanitizer.")
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")
    if args.device == "cpu":
        from megatron_slm import cpu_platform

        cpu_platform.install()
    return args
