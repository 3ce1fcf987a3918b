"""Follow the loss of each validation token over a run's checkpoints (Rho-1, appendix B.1).

    torchrun --nproc_per_node 8 tools/token_dynamics.py ARGUMENTS OF THE TRAINING RUN \
        --load CHECKPOINTS --dynamics RUN/dynamics [--ckpt-steps 1000 2000 ...]
    python tools/token_dynamics.py classify RUN/dump --dynamics RUN/dynamics

The first command scores the same samples with each checkpoint, in any layout; if it is killed, the
same command continues.  The second uses the token dumps that training wrote (--slm-dump-interval),
which have fewer samples.  Both write token_dynamics.parquet, .png and .svg.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from megatron_slm.errors import exit_on_user_error
from megatron_slm.jobs.token_dynamics import main as score_and_classify


def main() -> None:
    """Score and classify, or only classify."""
    if sys.argv[1:2] == ["classify"]:
        from megatron_slm.analysis.dynamics.write_dynamics import write_dynamics

        parser = ArgumentParser("token_dynamics.py classify")
        parser.add_argument("dumps", type=Path, metavar="DUMPS")
        parser.add_argument("--dynamics", type=Path, required=True, metavar="DIR")
        parser.add_argument("--tokenizer-model", metavar="PATH")
        args = parser.parse_args(sys.argv[2:])
        with exit_on_user_error():
            write_dynamics(args.dumps, args.dynamics, args.tokenizer_model)
        return
    score_and_classify()


if __name__ == "__main__":
    main()
