"""Data that is lost in the middle of a run, and a loader's worker that is killed: one line that
names the file and what was kept."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import LLAMA, REFERENCE, write_dataset
from launch import Job, start
from real_text import docstrings

PATIENCE = 120  # seconds
RUN = f"""
    {" ".join([*REFERENCE, *LLAMA])} --tokenizer-type NullTokenizer --vocab-size 257
    --data-path data --split 100,0,0 --seq-length 64 --micro-batch-size 1 --global-batch-size 1
    --train-iters 100000 --lr 1e-3 --eval-interval 1000 --eval-iters 0 --log-interval 1
    --num-workers 1 --save saved --save-interval 4
"""


def _truncate(directory: Path, job: Job) -> None:
    os.truncate(directory / "data.bin", 100)


def _kill_worker(directory: Path, job: Job) -> None:
    rank = job.processes[0].pid
    children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    workers = [
        int(child)
        for child in children
        if Path(f"/proc/{child}/comm").read_text() == "pt_data_worker\n"
    ]
    os.kill(workers[0], signal.SIGKILL)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_truncate, "a dataset has changed during the run: data.bin has 100 bytes"),
        (_kill_worker, "a worker that loads data was killed, though the datasets' files are whole"),
    ],
    ids=["truncated", "killed"],
)
def test_data_lost(spoil: Callable[[Path, Job], None], said: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", docstrings(["argparse"]))
    job = start(1, ["-m", "megatron_slm.pretrain", *RUN.split()], tmp_path)
    (rank,), (output,) = job.processes, job.files
    deadline = time.monotonic() + PATIENCE
    while not (output.exists() and re.search(r"iteration +6/", output.read_text())):
        assert rank.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    spoil(tmp_path, job)
    rank.join(PATIENCE)
    text = output.read_text()
    assert rank.exitcode == 2, text[-3000:]
    # torch ends what it says of the bus error with a zero byte.
    (line,) = re.findall(r"^\0?error: (.*)", text, re.MULTILINE)
    assert said in line
    # A save that the end cuts off has a directory already.
    saved = int((tmp_path / "saved/latest_checkpointed_iteration.txt").read_text())
    assert (tmp_path / f"saved/iter_{saved:07d}/.metadata").exists()
    assert f"the last checkpoint in saved is of iteration {saved}" in line
    assert "Traceback" not in text
