"""The command line of tools/evaluate.py, which studies run for each of their arms."""

from __future__ import annotations

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.analysis.evaluation.benchmarks import MODELS, benchmarks
from megatron_slm.analysis.evaluation.scores import table_line, table_row, write_scores
from megatron_slm.errors import UserError, exit_on_user_error
from megatron_slm.parser import Parser

if TYPE_CHECKING:
    from megatron_slm.analysis.evaluation.evaluate import BenchmarkScore


def build_parser(about: str | None = None) -> Parser:
    """Build the parser of the command line, which raises UserError; `about` is for --help."""
    parser = Parser(description=about, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face or Megatron.")
    add("--ckpt-step", type=int, metavar="N", help="Megatron iteration. Default: the latest.")
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory with the tokenizer of a Megatron checkpoint. Default: the "
        "tokenizer of the training run.",
    )
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="math: the paper's mathematical tasks that lm-eval has. general: the paper's 15 "
        "general tasks. Or lm-eval's names of tasks.",
    )
    add("--include-path", type=Path, metavar="DIR", help="Directory of your own tasks, in YAML.")
    add("--output", type=Path, metavar="FILE", help="Write the scores as JSON.")
    add("--batch-size", type=int, default=8, metavar="N", help="Default: 8.")
    add("--device", help="Name of a torch device. Default: all GPUs, or the CPU.")
    add(
        "--run-generated-code",
        action="store_true",
        help="Let tasks such as humaneval run code that the model writes.",
    )
    return parser


def run(args: Namespace) -> None:
    """Run the tasks and print their scores.

    Raises:
        UserError: the input is wrong.
    """
    if args.output is not None and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no directory {args.output.parent}")
    if args.output is not None and args.output.is_dir():
        raise UserError(f"--output {args.output} is a directory; name a file")
    if not args.model.is_dir():
        raise UserError(f"--model {args.model}: no such directory")
    # Imported here, so that the checks above need no torch.
    from megatron_slm.analysis.evaluation.evaluate import (
        evaluate,
        hugging_face_directory,
        load_tasks,
    )

    wanted = benchmarks(args.tasks)
    tasks = load_tasks(wanted, args.include_path, args.run_generated_code)
    scores: list[BenchmarkScore] = []
    with hugging_face_directory(args.model, args.ckpt_step, args.like) as directory:
        for some in evaluate(directory, tasks, args.batch_size, args.device):
            if not scores:
                paper = [f"{name}*" for name in MODELS]
                print(table_line("task", "shots", "samples", "metric", "score", "stderr", *paper))
            print(*map(table_row, some), sep="\n", flush=True)
            scores += some
    if not scores:
        return  # not the first rank
    if any(benchmark.paper for benchmark in wanted):
        print("* the paper, after 15B tokens, reasoning step by step in every task")
    for benchmark in wanted:
        if benchmark.differs:
            print(f"{benchmark.name}: {benchmark.differs}")
    if args.output is not None:
        write_scores(args.output, args.model, scores)


def main(arguments: list[str], about: str | None = None) -> None:
    """Run the command line; exit with code 2 if the input is wrong."""
    with exit_on_user_error("no scores were kept; the same command starts again"):
        run(build_parser(about).parse_args(arguments))


if __name__ == "__main__":
    main(sys.argv[1:], __doc__)
