"""Store a reference's losses, so that training runs need no reference model.

    torchrun --nproc_per_node 8 tools/score_reference.py ARGUMENTS OF THE TRAINING RUN \
        --slm-reference-load DIR --slm-reference-cache CACHE [--by document] [--cache-dtype float32]
    python tools/score_reference.py inspect CACHE [--plot FILE.svg]
    python tools/score_reference.py longppl CACHE --evaluator LONG SHORT --data-path PREFIX

Give it the arguments of the training run.  Parallel sizes and --micro-batch-size may differ, and
the policy's own arguments may be left out.  A job that was killed continues with the same command.
Training reads the losses with --slm-reference-cache CACHE in place of --slm-reference-load.
"""

from __future__ import annotations

import sys

from megatron_slm.errors import exit_on_user_error
from megatron_slm.jobs.score_reference import main as score


def main() -> None:
    """Score, or show what was scored."""
    if sys.argv[1:2] == ["inspect"]:
        from megatron_slm.analysis.inspect_cache import inspect

        with exit_on_user_error():
            inspect(sys.argv[2:])
        return
    if sys.argv[1:2] == ["longppl"]:
        from megatron_slm.analysis.long_perplexity import longppl

        with exit_on_user_error():
            longppl(sys.argv[2:])
        return
    score()


if __name__ == "__main__":
    main()
