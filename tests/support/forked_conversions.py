"""Fork a process for each conversion in a line of standard input, a list of ["import" or "export",
source, target]: they run at once, without the imports.  Prints the line's process ids, and, when
all have ended, their exit codes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import megatron.core  # noqa: F401  which a checkpoint's arguments are read with

from megatron_slm.errors import exit_on_user_error
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face


def convert(command: str, source: str, target: str) -> None:
    with exit_on_user_error():
        if command == "import":
            import_hugging_face(Path(source), Path(target), 128)
        else:
            export_hugging_face(Path(source, "release"), Path(target), None, None, 10**7)


def forked(job: list[str]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            convert(*job)
            code = 0
        except SystemExit as end:
            code = int(str(end.code))
        finally:
            os._exit(code)
    return child


if __name__ == "__main__":
    for line in sys.stdin:
        children = [forked(job) for job in json.loads(line)]
        print(json.dumps(children), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
