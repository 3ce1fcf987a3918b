"""Run preprocess_data.py on datatrove's executors: on this machine, on Slurm or on Ray.

preprocess_data.py's options apply as well.  Every datatrove task makes a part of the shards, and
the last step merges them.  --workers is the number of cores that a task asks Slurm or Ray for; on
this machine all tasks share them.  The files are the same as those of preprocess_data.py, and each
of the two tools can continue what the other has begun.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from preprocess_data import build_parser, report, settings_of

from megatron_slm.corpus.preprocessing.executors import run_with_datatrove
from megatron_slm.corpus.preprocessing.preprocess import preprocess
from megatron_slm.errors import UserError, exit_on_user_error


def main(arguments: list[str]) -> None:
    """Run the command line; exit with code 2 if the input is wrong."""
    parser = build_parser()
    parser.description = (__doc__ or "").splitlines()[0]
    group = parser.add_argument_group("datatrove")
    group.add_argument("--executor", choices=["local", "slurm", "ray"], default="local")
    group.add_argument("--tasks", type=int, default=1, metavar="N", help="Number of tasks.")
    group.add_argument("--logging-dir", required=True, metavar="DIR")
    group.add_argument("--partition", help="Slurm partition; required with Slurm.")
    group.add_argument("--qos", default="normal", help="Slurm QOS. Default: normal.")
    group.add_argument("--time", default="24:00:00", help="Time limit of a Slurm task.")
    args = parser.parse_args(arguments)
    with exit_on_user_error("the same command goes on; finished shards are kept"):
        if args.tasks < 1:
            raise UserError("--tasks must be at least 1")
        if "-" in args.input:
            raise UserError("--input -: tasks do not share standard input; write it to a file")
        settings = settings_of(args)
        options: dict[str, Any] = {}
        if args.executor == "slurm":
            if args.partition is None:
                raise UserError("--executor slurm: name a --partition")
            options = {"partition": args.partition, "time": args.time, "qos": args.qos}
        run_with_datatrove(settings, args.executor, args.tasks, args.logging_dir, options)
        if args.executor == "slurm":
            print("submitted; when all jobs are done, run preprocess_data.py to merge")
            return
        summary = preprocess(replace(settings, stage="all"))
        print("" if summary is None else report(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
