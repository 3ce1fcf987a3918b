"""Fork the ranks of a job for each line of standard input, {"tool", "ranks", "arguments",
"directory", "environment"}, from a process that has imported Megatron: most of the time of a job.

Prints the ranks' process ids, the first of which is also their process group's, and when all have
ended, their exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import megatron_imported  # noqa: F401  # first, since it makes this machine the platform
import recorded_experts
import recorded_reads
from megatron_slm import pretrain
from megatron_slm.entry import add_arguments
from megatron_slm.errors import exit_on_user_error
from megatron_slm.jobs import scoring
from megatron_slm.training.command_line.first_check import SCORING


def record() -> None:
    recorded = runpy.run_path(str(Path(__file__).with_name("recorded_pretrain.py")))
    pretrain._pretrain = recorded["train_recorded"]
    pretrain.train()


def score() -> None:
    scoring.score(scoring.parse_scoring_arguments(partial(add_arguments, job=SCORING)))


def run(rank: int, job: dict[str, Any]) -> int:
    """In the forked process: what the tool does."""
    with Path(job["directory"], f"rank{rank}.log").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= job["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(job["directory"])
    sys.path.insert(0, "")  # as in python -m
    sys.argv = [job["tool"], *job["arguments"]]
    try:
        with exit_on_user_error():
            recorders = {
                "record experts": recorded_experts.train,
                "record reads": recorded_reads.train,
            }
            tools = {"train": pretrain.train, "record": record, "score": score}
            (tools | recorders)[job["tool"]]()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        children: list[int] = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = run(rank, job)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children.append(child)
            os.setpgid(child, children[0])
        print(json.dumps(children), flush=True)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(ended), flush=True)
