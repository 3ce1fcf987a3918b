"""Run tools in forked processes of bounded memory and time: standard input is a list of
[tool, arguments ...], and standard output has a line of [code, stderr] for each."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from corpus import run_tool
from megatron_slm.corpus.indexed import retokenize
from megatron_slm.corpus.reading import chat

MEMORY = 5 << 29  # bytes, on top of what the imports take
SECONDS = 60  # of a core
assert retokenize  # all of the package is loaded once, before the forks


def run(tool: str, arguments: list[str]) -> list[object]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    chat.SECONDS = 0.3
    found = run_tool(tool, *arguments)
    return [found.code, found.err[-20_000:]]


if __name__ == "__main__":
    for tool, *arguments in json.load(sys.stdin):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(run(tool, arguments)).encode())
            sys.exit(0)  # not at once: what a library frees at the end counts, too
        os.close(writing)
        with open(reading, "rb") as pipe:
            said = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(said if code == 0 else json.dumps([code, "the process ended"]), flush=True)
