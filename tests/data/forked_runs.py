"""Fork a process for each line of standard input, {"inputs", "prefix", "options", "crash_at"}: it
runs preprocess_data.py without the imports.  Prints its process id, and at the end the code."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import preprocess


def crash_at_call(number: int) -> None:
    """End this process, as by kill -9, before the number-th change of a directory."""
    calls = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **named)

        return changed

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def run(job: dict[str, Any]) -> int:
    if job["crash_at"] is not None:
        crash_at_call(job["crash_at"])
    return preprocess(job["inputs"], Path(job["prefix"]), *job["options"], check=False).code


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
