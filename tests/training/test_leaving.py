"""A run with dumps and loader workers ends, by itself, by --exit-interval and by a signal."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from jobs import Checkpoints, Corpus
from launch import start

# The handler of the signal is also the workers', so that only their loader can end them.
FLAGS = "--micro-batch-size 3 --num-workers 1 --exit-signal-handler --slm-dump-interval 100"
SECONDS = 300  # against a hang


@pytest.mark.parametrize("end", ["by itself", "by --exit-interval", "by a signal"])
def test_run_ends(end: str, corpus: Corpus, untied: Checkpoints, tmp_path: Path) -> None:
    steps = {"by itself": "3", "by --exit-interval": "50 --exit-interval 3", "by a signal": "9999"}
    flags = f"{FLAGS} --slm-dump-dir dump --train-iters {steps[end]}"
    arguments = [*corpus.arguments, *untied.without_reference, *flags.split()]
    dump = tmp_path / "dump"
    # As users start it: a forked process ends otherwise.
    job = start(1, ["-m", "megatron_slm.pretrain", *arguments], tmp_path, fresh_threads=1)
    (process,) = job.processes
    try:
        if end == "by a signal":
            deadline = time.monotonic() + SECONDS
            while not list(dump.glob("iter_*")) and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0, job.files[0].read_text()[-3000:]
    finally:
        process.kill()
    # At the start, and at the end, however it came.
    begun, ended = sorted(path.stem for path in dump.glob("iter_*"))
    assert begun == "iter_0000000"
    assert end == "by a signal" or ended == "iter_0000003"
