"""Write a page about a run, or about a study of several runs, to open in a browser.

    python tools/report.py RUN [-o report.html]

RUN is a run's directory, with any of tensorboard/ (--tensorboard-dir), dump/ (--slm-dump-dir) and
dynamics/ (token_dynamics.py); or the directory of a study of tools/run_experiment.py, with
results.json and runs/.  The page needs no network and no other file.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from megatron_slm.analysis.report.page import write_report
from megatron_slm.errors import exit_on_user_error


def main() -> None:
    """Write the page; exit with code 2 if the input is wrong."""
    parser = ArgumentParser("report.py", description="Write a page about a run or a study.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="Default: RUN/report.html."
    )
    parser.add_argument(
        "--tokenizer-model", metavar="PATH", help="Default: that of the run, if it still exists."
    )
    args = parser.parse_args()
    output = args.output or args.run / "report.html"
    with exit_on_user_error():
        write_report(args.run, output, args.tokenizer_model)
    print(f"> {output.resolve()}")


if __name__ == "__main__":
    main()
