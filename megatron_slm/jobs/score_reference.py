"""Store a reference's losses, as tools/score_reference.py does:  torchrun ... -m this module."""

from __future__ import annotations

from functools import partial

from megatron_slm.entry import add_arguments, start
from megatron_slm.training.first_check import SCORING


def main() -> None:
    """Check the command line, and score."""
    start(SCORING, _score)


def _score(cpu: bool) -> None:
    # Megatron may be imported only when the platform is installed.
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from megatron_slm.jobs.scoring import parse_scoring_arguments, score
    from megatron_slm.model.layer_spec import plain_block_spec
    from megatron_slm.training.arguments import validate_arguments
    from megatron_slm.training.data_faults import data_faults

    args = parse_scoring_arguments(partial(add_arguments, cpu=cpu, job=SCORING))
    validate_arguments(args)
    with data_faults(args, kept="the same command goes on with what was scored"):
        score(args, None if HAVE_TE else plain_block_spec)


if __name__ == "__main__":
    main()
