"""Fork a process for each line of standard input, {"inputs", "prefix", "options", "crash_at"}: it
runs preprocess_data.py without the imports, in a process group of its own.  Prints its process id,
and, when none of the group is left, its code."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from corpus import preprocess

PR_SET_CHILD_SUBREAPER = 36


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
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # workers are ours when their parent is dead
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        os.setpgid(child, child)
        print(child, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-child, 0)
        print(code, flush=True)
