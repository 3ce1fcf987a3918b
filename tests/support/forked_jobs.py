"""Jobs whose ranks are forked from a process that has imported Megatron already."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import TCPStore

from launch import PYTHONPATH


@dataclass
class Server:
    """A process that forks the ranks of jobs."""

    process: subprocess.Popen[bytes]
    running: list[int] = field(default_factory=list)  # process ids of a job whose end is not read

    def start(self, tool: str, ranks: int, arguments: list[str], directory: Path) -> list[int]:
        """Start a job and return its ranks' process ids."""
        if self.running:  # of a test that failed
            with suppress(ProcessLookupError):
                os.killpg(self.running[0], signal.SIGKILL)
            self.codes()
        directory.mkdir(parents=True, exist_ok=True)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        job = {
            "tool": tool,
            "ranks": ranks,
            "arguments": arguments,
            "directory": str(directory),
            "environment": environment,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.running = self._line()
        return self.running

    def has_ended(self) -> bool:
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def codes(self) -> list[int]:
        """Wait for the job's end and return its exit codes."""
        self.running, codes = [], self._line()
        return codes

    def _line(self) -> list[int]:
        assert self.process.stdout is not None
        numbers: list[int] = json.loads(self.process.stdout.readline())
        return numbers

    def run(self, tool: str, ranks: int, arguments: list[str], directory: Path) -> list[str]:
        """Run a job to its end, which must be good, and return what each rank printed."""
        self.start(tool, ranks, arguments, directory)
        codes = self.codes()
        outputs = [(directory / f"rank{rank}.log").read_text() for rank in range(ranks)]
        assert codes == [0] * ranks, outputs[0][-3000:]
        return outputs


@contextmanager
def serving() -> Iterator[Server]:
    """Run the process while the block lasts."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_ranks.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ
        | {
            "PYTHONPATH": PYTHONPATH,
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        },
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()  # and with it ranks that hang
