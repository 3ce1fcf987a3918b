"""Write a page about a run, or about a study of several runs, to open in a browser.

    python tools/report.py RUN [-o report.html]
    python tools/report.py STUDY --figure tokens [--arms slm random] [-o figure.svg]

RUN is a run's directory, with any of tensorboard/ (--tensorboard-dir), dump/ (--slm-dump-dir) and
dynamics/ (token_dynamics.py); or the directory of a study of tools/run_experiment.py, with
results.json and runs/.  The page needs no network and no other file.

With --figure, one picture of a study is written instead, as SVG: the loss on the target over tokens
or over compute, or each arm's difference from the baseline.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from megatron_slm.analysis.report.page import write_report
from megatron_slm.analysis.report.picture import PICTURES, write_picture
from megatron_slm.errors import UserError, exit_on_user_error


def parse() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        "report.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="Default: RUN/report.html, or RUN/FIGURE.svg.",
    )
    add("--tokenizer-model", metavar="PATH", help="Default: that of the run, if it still exists.")
    add("--figure", choices=PICTURES, help="Draw this figure of a study, as SVG.")
    add("--arms", nargs="+", metavar="ARM", help="The figure's arms. Default: all of the study's.")
    return parser.parse_args()


def main() -> None:
    """Write the page or the picture; exit with code 2 if the input is wrong."""
    args = parse()
    name = "report.html" if args.figure is None else f"{args.figure}.svg"
    output = args.output or args.run / name
    with exit_on_user_error():
        if args.figure is not None:
            write_picture(args.run, args.figure, args.arms or (), output)
        elif args.arms:
            raise UserError("--arms chooses the arms of a picture: give --figure, too")
        else:
            write_report(args.run, output, args.tokenizer_model)
        print("> " + os.fsencode(output.resolve()).decode(errors="replace"))


if __name__ == "__main__":
    main()
