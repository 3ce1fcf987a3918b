"""The job of tools/score_reference.py: store the losses of a reference."""

from __future__ import annotations

from functools import partial

from megatron_slm.entry import add_arguments, start
from megatron_slm.training.command_line.first_check import SCORING


def main() -> None:
    """Check the command line, and score."""
    start(SCORING, _score)


def _score() -> None:
    # Megatron may only be imported after the platform is installed.
    from megatron_slm.jobs.scoring import parse_scoring_arguments, score
    from megatron_slm.training.data_faults import data_faults

    args = parse_scoring_arguments(partial(add_arguments, job=SCORING))
    with data_faults(args, kept="the same command goes on with what was scored"):
        score(args)


if __name__ == "__main__":
    main()
