"""The job of tools/token_dynamics.py: score validation tokens with every checkpoint of a run, and
classify them by how their losses change."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_slm.entry import add_arguments, start
from megatron_slm.training.command_line.first_check import DYNAMICS


def main() -> None:
    """Check the command line, score and classify."""
    start(DYNAMICS, _score_and_classify)


def _score_and_classify() -> None:
    from megatron_slm.analysis.dynamics.dynamics_files import check_libraries

    check_libraries()
    # Megatron may only be imported after the platform is installed.
    from megatron_slm.analysis.dynamics.write_dynamics import write_dynamics
    from megatron_slm.jobs.checkpoint_losses import parse_dynamics_arguments, score_checkpoints

    args = parse_dynamics_arguments(partial(add_arguments, job=DYNAMICS))
    losses = score_checkpoints(args)
    if args.rank == 0:
        write_dynamics(losses, Path(args.dynamics), None, args.ckpt_steps)


if __name__ == "__main__":
    main()
