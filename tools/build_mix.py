"""Divide a token budget among datasets according to a recipe, and write the file for
--data-args-path."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from megatron_slm.corpus.mixing.blend import check_draws
from megatron_slm.corpus.mixing.mix import build_mix, read_mix, shares_table, write_mix
from megatron_slm.errors import UserError, exit_on_user_error


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "recipe",
        help="YAML file; see examples/mixes. megatron_slm/corpus/mixing/mix.py has the format.",
    )
    add(
        "--data-root", type=Path, default=Path(), metavar="DIR", help="Base of relative data paths."
    )
    add("--output-prefix", required=True, metavar="PREFIX")
    add(
        "--check-sequence-length",
        type=int,
        metavar="S",
        help="Have Megatron build the blend for samples of S tokens, and compare what it draws "
        "with the recipe. A difference of more than 0.1%% of all tokens is an error.",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Print the table; exit with code 2 if the recipe cannot be met."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error():
        recipe = read_mix(args.recipe)
        shares = build_mix(recipe, args.data_root)
        print(shares_table(recipe, shares))
        length = args.check_sequence_length
        if length is not None:
            if not 1 <= length <= recipe.budget:
                raise UserError(
                    f"--check-sequence-length {length}: must be from 1 to the budget's "
                    f"{recipe.budget} tokens"
                )
            parts = check_draws(recipe, shares, length)
            for share, part in zip(shares, parts, strict=True):
                more = part - share.tokens / recipe.budget
                of_its_own = more * recipe.budget / max(1, share.tokens)
                print(
                    f"drawn: {share.source.name} {part:.3%}, {more:+.3%} of all tokens, "
                    f"{of_its_own:+.3%} of its own"
                )
            print(f"train on --train-samples {recipe.budget // length}")
        write_mix(recipe, shares, args.output_prefix)
        print(f"--data-args-path {args.output_prefix}.data-args.txt --split 100,0,0 --eval-iters 0")


if __name__ == "__main__":
    main(sys.argv[1:])
