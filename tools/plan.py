"""Estimate what a recipe takes on a cluster before it is started: memory, FLOPs and time.

    python tools/plan.py examples/pretrain_slm_7b.sh
    python tools/plan.py examples/pretrain_slm_7b.sh NODES=16 --gpu-memory 141
    python tools/plan.py examples/pretrain_slm_70b.sh --dry-run 0 255

Memory and FLOPs come from formulas (megatron_slm/planning/formulas.py); times follow from them, the
GPU's peak and --efficiency.  The report also proposes faster layouts.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from megatron_slm.errors import UserError, exit_on_user_error


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", type=Path, help="Script that prints its command under DRY_RUN=1.")
    add("settings", nargs="*", metavar="NAME=VALUE", help="The script's variables.")
    add(
        "--vocab-size",
        dest="vocabulary",
        type=int,
        default=32000,
        metavar="N",
        help="Tokens, where the recipe does not say. Default: 32000.",
    )
    add("--gpus-per-node", type=int, default=8, metavar="N")
    add("--gpu-memory", type=float, default=80, metavar="GB", help="Default: 80.")
    add(
        "--gpu-tflops",
        type=float,
        default=989,
        metavar="N",
        help="Peak in bf16. Default: an H100's.",
    )
    add(
        "--efficiency",
        type=float,
        default=0.5,
        metavar="F",
        help="Fraction of the peak that matrix products reach. Default: 0.5.",
    )
    add("--memory-bandwidth", type=float, default=3350, metavar="GB/s", help="Default: an H100's.")
    add("--node-bandwidth", type=float, default=450, metavar="GB/s", help="Per GPU. Default: 450.")
    add("--network-bandwidth", type=float, default=50, metavar="GB/s", help="Per GPU. Default: 50.")
    add(
        "--kernels",
        choices=("te", "plain"),
        default="te",
        help="te: Transformer Engine's layers, with Apex as in NVIDIA's container; without Apex, "
        "the output layer's gradient takes extra memory. plain: plain torch. Default: te.",
    )
    add(
        "--dry-run",
        type=int,
        nargs="+",
        metavar="RANK",
        help="Instead of a report, build the policy and references of these ranks without weights.",
    )
    add(
        "--layouts",
        type=int,
        default=5,
        metavar="N",
        help="Number of layouts to propose. Default: 5.",
    )
    return parser


def check_numbers(args: Namespace) -> None:
    """Check the numbers of a command line.

    Raises:
        UserError: one of them is out of range.
    """
    for name, number in vars(args).items():
        flag = "--vocab-size" if name == "vocabulary" else f"--{name.replace('_', '-')}"
        least = 0 if name == "layouts" else 1e-9
        if isinstance(number, int | float) and not least <= number < math.inf:
            raise UserError(f"{flag} {number:g}: give a number above 0")
    if args.efficiency > 1:
        raise UserError(f"--efficiency {args.efficiency:g}: give a fraction of the peak, up to 1")


def use_platform() -> None:
    """Install the CPU platform, without its messages, since a plan needs no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # Megatron warns for each model it builds
    from megatron_slm import cpu_platform

    cpu_platform.install()


def main(arguments: list[str]) -> None:
    """Run the command line; exit with code 2 if the input is wrong."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error():
        check_numbers(args)
        for setting in args.settings:
            if "=" not in setting:
                raise UserError(f"{setting}: give the script's variables as NAME=VALUE")
        use_platform()
        from megatron_slm.planning.launch_recipe import read_launch_recipe
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
