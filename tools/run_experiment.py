"""Compare ways of selecting tokens: run all arms of a recipe from one start, on the same data.

    python tools/run_experiment.py examples/experiments/default.yaml -o runs/default --jobs 2
    python tools/run_experiment.py RECIPE -o DIR --arms slm random --seeds 1

If it is stopped or killed, the same command continues.  DIR gets results.md, results.json, stages/
and runs/ARM-seedN/ with log, tensorboard and checkpoints.  The format of a recipe is described in
megatron_slm/analysis/experiments/recipe.py.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)  # Megatron warns about optional packages

from megatron_slm.analysis.experiments.experiment import run_experiment
from megatron_slm.errors import exit_on_user_error


def positive(text: str) -> float:
    """Parse a number above 0 and at most a million."""
    number = float(text)
    if not 0 < number <= 1e6:
        raise ArgumentTypeError(f"{text} is not a number above 0 and at most a million")
    return number


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", type=Path)
    add("-o", "--output", type=Path, required=True, metavar="DIR")
    add("--jobs", type=int, default=1, metavar="N", help="Runs at a time, which share the cores.")
    add("--arms", nargs="+", metavar="ARM", help="Arms to run besides clm. Default: all.")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="Default: all of the recipe's seeds.")
    add(
        "--scale",
        type=positive,
        default=1.0,
        metavar="F",
        help="Multiply the iterations and tokens of all runs, for more hardware or for a trial.",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Run the command line; exit with code 2 if the input is wrong."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error("the same command goes on with what is not done"):
        print(
            run_experiment(
                args.recipe, args.output, max(1, args.jobs), args.arms, args.seeds, args.scale
            )
        )


if __name__ == "__main__":
    main(sys.argv[1:])
