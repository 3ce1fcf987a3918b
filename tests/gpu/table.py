"""Lines of the table that tests/gpu/run.sh prints, and whether what they say is right."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

MARK = "| "
WRONG = "WRONG"


def row(what: str, figure: str, aim: str = "", right: bool | None = None) -> None:
    """Print a figure that has to be right; None where nothing depends on it."""
    _print(what, figure, aim, {None: "", True: "ok", False: WRONG}[right])


def measured(what: str, figure: str, aim: str, met: bool) -> None:
    """Print a figure that is hoped to meet an aim."""
    _print(what, figure, aim, "met" if met else "missed")


def skipped(what: str, why: str) -> None:
    """Print that something was not done."""
    _print(what, f"skipped: {why}", "", "")


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """Print why the block failed, if it does, and go on with what comes after it."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}".replace("|", "/")
        row(what, " ".join(why.split())[-200:], "that it runs", False)


def _print(*cells: str) -> None:
    print(f"{MARK}{' | '.join(cells)} |", flush=True)


def arguments(about: str | None) -> Namespace:
    """Read a check's command line, and prepare the device that it names."""
    parser = ArgumentParser(description=about)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="Sizes for a CPU or a sanitizer.")
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("took too long"))
    if args.device == "cpu":
        from megatron_slm import cpu_platform

        cpu_platform.install()
    return args
