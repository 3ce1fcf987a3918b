"""Run the command lines of commands.json on forked ranks 0 and 3 of a job of four, and write exit
codes and outputs to refusals.json.  Forked, since every one of them needs the same slow imports,
and none should get as far as starting a thread."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from megatron_slm import cpu_platform

cpu_platform.install()

import megatron.core.tokenizers.text
import megatron.training.arguments  # noqa: F401

from megatron_slm import pretrain, selective  # noqa: F401

PATIENCE = 60  # seconds, before a rank counts as hanging


def refusals(arguments: list[str], ranks: tuple[int, ...]) -> list[tuple[int, str]]:
    """Exit code and output of each of these ranks, which run at a time."""
    return [ended(*begun) for begun in [begin(arguments, rank) for rank in ranks]]


def begin(arguments: list[str], rank: int) -> tuple[int, Path]:
    """Fork a process that runs as one rank; return its id and the file it prints to."""
    output = Path(f"output{rank}")
    child = os.fork()
    if child == 0:
        file = output.open("w")
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
        sys.argv = ["pretrain", *arguments]
        code = 0
        try:
            pretrain.main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(repr(error))
            code = 1
        sys.stdout.flush()
        os._exit(code)
    return child, output


def ended(child: int, output: Path) -> tuple[int, str]:
    """Exit code and output."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), output.read_text()
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -9, output.read_text()


if __name__ == "__main__":
    commands = json.loads(Path("commands.json").read_text())
    found = {case: refusals(command, (0, 3)) for case, command in commands.items()}
    Path("refusals.json").write_text(json.dumps(found))
