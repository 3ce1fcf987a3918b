"""One page about a run, or about a study of several, to look at in a browser.

    python tools/report.py RUN [-o report.html]

RUN has tensorboard/ (--tensorboard-dir), dump/ (--slm-dump-dir) and dynamics/ (token_dynamics.py),
each if there is one, or is a study of tools/run_experiment.py with its results.json and runs/.  The
page needs no network and no other file.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from megatron_slm.analysis.report.page import write_report
from megatron_slm.errors import exit_on_user_error


def main() -> None:
    """Write it."""
    parser = ArgumentParser("report.py", description="Write a page about a run or a study.")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="Default: RUN/report.html."
    )
    parser.add_argument(
        "--tokenizer-model", metavar="PATH", help="Default: that of the run, if it is still there."
    )
    args = parser.parse_args()
    output = args.output or args.run / "report.html"
    with exit_on_user_error():
        write_report(args.run, output, args.tokenizer_model)
    print(f"> {output.resolve()}")


if __name__ == "__main__":
    main()
