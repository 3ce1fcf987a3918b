"""What a recipe takes on a cluster, before it is started: memory, FLOPs, time, and better layouts.

    python tools/plan.py examples/pretrain_slm_7b.sh
    python tools/plan.py examples/pretrain_slm_7b.sh NODES=16 --gpu-memory 141
    python tools/plan.py examples/pretrain_slm_70b.sh --dry-run 0 255

Memory and FLOPs are by formula (megatron_slm/planning/formulas.py), times from them, the GPU's peak
and --efficiency.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from megatron_slm.errors import UserError, exit_on_user_error


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", type=Path, help="A script that prints its command under DRY_RUN=1.")
    add("settings", nargs="*", metavar="NAME=VALUE", help="The script's variables.")
    add("--vocab-size", dest="vocabulary", type=int, default=32000, metavar="N")
    add("--gpus-per-node", type=int, default=8, metavar="N")
    add("--gpu-memory", type=float, default=80, metavar="GB", help="Default: 80.")
    add(
        "--gpu-tflops", type=float, default=989, metavar="N", help="Peak, bf16. Default: an H100's."
    )
    add("--efficiency", type=float, default=0.5, help="What products reach of it. Default: 0.5.")
    add("--memory-bandwidth", type=float, default=3350, metavar="GB/s", help="Default: an H100's.")
    add("--node-bandwidth", type=float, default=450, metavar="GB/s", help="Of a GPU. Default: 450.")
    add("--network-bandwidth", type=float, default=50, metavar="GB/s", help="Default: 50.")
    add(
        "--kernels",
        choices=("te", "plain"),
        default="te",
        help="Layers: Transformer Engine's, with Apex beside it as in NVIDIA's container (without "
        "Apex the output layer's gradient comes on top), or plain ones. Default: te.",
    )
    add(
        "--dry-run",
        type=int,
        nargs="+",
        metavar="RANK",
        help="Instead, build the policy and reference of these ranks of the job, without weights.",
    )
    add("--layouts", type=int, default=5, metavar="N", help="How many to propose. Default: 5.")
    return parser


def use_platform() -> None:
    """Install the CPU platform, silently: a plan needs no GPU, and takes none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # Megatron's, for each model built
    from megatron_slm import cpu_platform

    cpu_platform.install()


def main(arguments: list[str]) -> None:
    """Exit with code 2 on bad input."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error():
        for setting in args.settings:
            if "=" not in setting:
                raise UserError(f"{setting}: give the script's variables as NAME=VALUE")
        use_platform()
        from megatron_slm.planning.recipe import read_launch_recipe
        from megatron_slm.planning.report import build_ranks, report

        settings = dict(setting.split("=", 1) for setting in args.settings)
        recipe = read_launch_recipe(args.recipe, settings)
        if args.dry_run:
            for built in build_ranks(args, recipe):
                print(built, flush=True)
        else:
            print(report(args, recipe))


if __name__ == "__main__":
    main(sys.argv[1:])
