"""Store a reference's losses, so that training runs need no reference model.

    torchrun --nproc_per_node 8 tools/score_reference.py ARGUMENTS OF THE TRAINING RUN \
        --slm-reference-load DIR --slm-reference-cache CACHE [--by document] [--cache-dtype float32]
    python tools/score_reference.py inspect CACHE [--plot FILE.svg]

Give it what the training run is given; parallel sizes and --micro-batch-size may be others, and the
policy's own arguments may be left out.  A job that was killed goes on where it was.  Training reads
the losses with --slm-reference-cache CACHE in the place of --slm-reference-load.
"""

from __future__ import annotations

import sys
from functools import partial

from megatron_slm.entry import add_arguments, start
from megatron_slm.errors import exit_on_user_error
from megatron_slm.training.first_check import SCORING


def main() -> None:
    """Score, or look at what was scored."""
    if sys.argv[1:2] == ["inspect"]:
        from megatron_slm.analysis.score_cache import main as inspect

        with exit_on_user_error():
            inspect(sys.argv[2:])
        return
    start(SCORING, run)


def run() -> None:
    """Score."""
    # Megatron may be imported only when the platform is installed.
    from megatron_slm.training.data_faults import data_faults
    from megatron_slm.training.scoring import parse_arguments, score

    args = parse_arguments(partial(add_arguments, job=SCORING))
    with data_faults(args, kept="the same command goes on with what was scored"):
        score(args)


if __name__ == "__main__":
    main()
