"""How the loss of each validation token changes over a run's checkpoints (Rho-1, appendix B.1).

    torchrun --nproc_per_node 8 tools/token_dynamics.py ARGUMENTS OF THE TRAINING RUN \
        --load CHECKPOINTS --dynamics RUN/dynamics [--ckpt-steps 1000 2000 ...]
    python tools/token_dynamics.py classify RUN/dump --dynamics RUN/dynamics

The first scores the same samples with each checkpoint, in any layout; killed, it goes on with the
same command.  The second takes the token dumps that training wrote (--slm-dump-interval), which are
of fewer samples.  Both write token_dynamics.parquet, .png and .svg.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

from megatron_slm.entry import add_arguments, start
from megatron_slm.errors import exit_on_user_error
from megatron_slm.training.first_check import DYNAMICS


def main() -> None:
    """Score and classify, or classify alone."""
    if sys.argv[1:2] == ["classify"]:
        from megatron_slm.analysis.dynamics_report import write_dynamics

        parser = ArgumentParser("token_dynamics.py classify")
        parser.add_argument("dumps", type=Path, metavar="DUMPS")
        parser.add_argument("--dynamics", type=Path, required=True, metavar="DIR")
        parser.add_argument("--tokenizer-model", metavar="PATH")
        args = parser.parse_args(sys.argv[2:])
        with exit_on_user_error():
            write_dynamics(args.dumps, args.dynamics, args.tokenizer_model)
        return
    start(DYNAMICS, run)


def run() -> None:
    """Score, and classify on the first rank."""
    from megatron_slm.analysis.dynamics_files import check_libraries

    check_libraries()
    # Megatron may be imported only when the platform is installed.
    from megatron_slm.analysis.dynamics_report import write_dynamics
    from megatron_slm.training.checkpoint_losses import parse_arguments, score_checkpoints

    args = parse_arguments(partial(add_arguments, job=DYNAMICS))
    losses = score_checkpoints(args)
    if args.rank == 0:
        write_dynamics(losses, Path(args.dynamics), None, args.ckpt_steps)


if __name__ == "__main__":
    main()
