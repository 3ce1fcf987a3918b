"""Check Megatron indexed datasets: sizes, offsets, ids, hashes, and with --deep their texts."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

from megatron_slm.corpus.indexed.retokenize import check_deeply
from megatron_slm.corpus.indexed.verify import check_wholly, pairs_of
from megatron_slm.corpus.tokenizers.tokenizer_file import open_tokenizer
from megatron_slm.data.dataset_check import check_quickly
from megatron_slm.data.manifest_types import PairManifest
from megatron_slm.errors import UserError, exit_on_user_error


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("prefix", nargs="+", help="Paths of the datasets without .bin and .idx.")
    add("--quick", action="store_true", help="Check only what training checks at its start.")
    add("--deep", action="store_true", help="Tokenize some of the texts again and compare.")
    add("--tokenizer-model", metavar="PATH", help="For --deep; also bounds the ids.")
    add("--chat-template", metavar="FILE", help="For --deep, if the texts are conversations.")
    add("--vocab-size", type=int, metavar="N", help="Bound of the ids. Default: the manifest's.")
    add(
        "--shards",
        type=int,
        default=16,
        metavar="N",
        help="Number of shards for --deep. Default: 16.",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    return parser


def main(arguments: list[str]) -> None:
    """Print a line for each correct dataset; exit with code 2 at the first that is not."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error():
        if args.deep and args.tokenizer_model is None:
            raise UserError("--deep needs --tokenizer-model")
        if min(args.workers, args.shards) < 1:
            raise UserError("--workers and --shards must be at least 1")
        vocab_size = args.vocab_size
        if vocab_size is None and args.tokenizer_model is not None:
            vocab_size = open_tokenizer(args.tokenizer_model).vocab_size
        for given in args.prefix:
            for prefix, manifest in pairs_of(given):
                print(_checked(args, prefix, manifest, vocab_size))


def _checked(
    args: Namespace, prefix: str, manifest: PairManifest | None, vocab_size: int | None
) -> str:
    """Check a pair of files, and return the line to print if it is correct.

    Raises:
        UserError: the pair of files is not correct.
    """
    dataset = check_quickly(prefix, manifest=manifest)
    if not args.quick:
        check_wholly(dataset, vocab_size, args.workers)
    compared = ""
    if args.deep:
        count = check_deeply(dataset, args.tokenizer_model, args.chat_template, args.shards)
        compared = f", {count:,} tokenized again"
    known = "" if dataset.manifest is not None else ", no manifest"
    return (
        f"{prefix}: right: {len(dataset.index.lengths):,} sequences, "
        f"{dataset.tokens:,} tokens of {dataset.index.dtype}{compared}{known}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
