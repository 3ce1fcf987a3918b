"""Tokenize corpora into Megatron indexed datasets, PREFIX_KEY_document.bin and .idx.

Options that Megatron-LM's tools/preprocess_data.py also has are named as there.  All cores are used
and memory is bounded.  A run that was killed continues when the same command is given again.  The
shards that the cores write are merged into one pair of files, since training starts slowly from a
blend of thousands of datasets; --no-merge keeps the shards.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace

from msgspec.structs import asdict

from megatron_slm.corpus.preprocessing.finish import PreprocessingSummary
from megatron_slm.corpus.preprocessing.preprocess import preprocess
from megatron_slm.corpus.preprocessing.settings import STAGES, PreprocessingSettings
from megatron_slm.corpus.tokenizers.engines import engine_names
from megatron_slm.data.dataset_check import TOKENIZER_KINDS
from megatron_slm.errors import exit_on_user_error

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def field_value(text: str) -> tuple[str, str]:
    """Parse FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return name, value


def byte_count(text: str) -> int:
    """Parse a number of bytes, such as 256M."""
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        return int(text if unit == 1 else text[:-1]) * unit
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a number of bytes, such as 256M") from error


def build_parser() -> ArgumentParser:
    """Build the parser of the command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add_input_options(parser)
    add_tokenizer_options(parser)
    add_cleaning_options(parser)
    add_run_options(parser)
    return parser


def add_input_options(parser: ArgumentParser) -> None:
    """Add the options for input and output."""
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), directories, quoted glob patterns, "
        "or - for jsonl from standard input. Read in this order; within directories and patterns, "
        "by name.",
    )
    group.add_argument("--output-prefix", required=True, metavar="PREFIX")
    group.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="Keys whose strings are the documents; each key makes one dataset. Default: text.",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        type=field_value,
        metavar="FIELD=VALUE",
        help="Take only records whose field has this value; a dotted path names a nested field. If "
        "given several times, all must match.",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template that turns the list of messages under the key into text.",
    )
    group.add_argument("--domain", metavar="NAME", help="Recorded in the manifest, for mixes.")


def add_tokenizer_options(parser: ArgumentParser) -> None:
    """Add the options for the tokenizer."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="sentencepiece model, tokenizer.json, tekken.json, or the directory of one.",
    )
    group.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_KINDS,
        help="The type given to training. Default: detected from the file.",
    )
    group.add_argument(
        "--engine",
        choices=["auto", *engine_names()],
        default="auto",
        help="Library that tokenizes. auto: the fastest one installed that gives the same ids as "
        "the tokenizer's own library on the first documents of up to 64 shards; otherwise that "
        "library itself. Existing shards made by an engine other than the one named are redone.",
    )
    group.add_argument(
        "--append-eod",
        action="store_true",
        help="End each document with the end-of-document token.",
    )
    group.add_argument(
        "--prepend-bos",
        action="store_true",
        help="Begin each document with the beginning-of-sequence token.",
    )
    group.add_argument(
        "--special-tokens-in-text",
        choices=["text", "ids"],
        default="text",
        help="What a control or special token that a document spells out, such as </s>, becomes: "
        "the tokens of its letters (text), or its id (ids). Sentencepiece's user-defined symbols "
        "and Hugging Face's added tokens that are not special always become their ids.",
    )


def add_cleaning_options(parser: ArgumentParser) -> None:
    """Add the options for cleaning."""
    group = parser.add_argument_group("cleaning")
    group.add_argument(
        "--dedup",
        choices=["exact", "near"],
        help="exact: drop documents with the same text as an earlier one. near: also those with "
        "nearly the same words.",
    )
    group.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Drop documents that share 13 consecutive words with these evaluation sets (jsonl).",
    )
    group.add_argument(
        "--max-reject-fraction",
        type=float,
        default=1e-4,
        metavar="F",
        help="Fail if more than this fraction of all documents read, including those that a filter "
        "leaves out, cannot be used. They are listed in PREFIX_rejects in any case. "
        "Default: 1e-4.",
    )


def add_run_options(parser: ArgumentParser) -> None:
    """Add the options for where and how the work is done."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="Number of processes, each on a core. Default: all cores.",
    )
    group.add_argument(
        "--shard-size",
        type=byte_count,
        default="256M",
        metavar="BYTES",
        help="Input of a shard, which is redone if the run is killed while making it. Compressed "
        "and parquet files are never split, however large. Default: 256M.",
    )
    group.add_argument("--merge", action=BooleanOptionalAction, default=True)
    group.add_argument(
        "--stage", choices=STAGES, default="all", help="Run one stage only, for Slurm arrays."
    )
    group.add_argument(
        "--rank", type=int, default=0, metavar="R", help="Number of this machine or job, from 0."
    )
    group.add_argument("--world-size", type=int, default=1, metavar="N")


def settings_of(args: Namespace) -> PreprocessingSettings:
    """Return the settings that the command line gives."""
    return PreprocessingSettings(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer_model=args.tokenizer_model,
        tokenizer_type=args.tokenizer_type,
        json_keys=tuple(args.json_keys),
        filters=tuple(args.filter),
        chat_template=args.chat_template,
        domain=args.domain,
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        special_ids=args.special_tokens_in_text == "ids",
        engine=args.engine,
        dedup=args.dedup,
        decontaminate=tuple(args.decontaminate),
        max_reject_fraction=args.max_reject_fraction,
        workers=args.workers,
        shard_size=args.shard_size,
        merge=args.merge,
        stage=args.stage,
        rank=args.rank,
        world_size=args.world_size,
    )


def report(summary: PreprocessingSummary) -> str:
    """Say what was written and what was left out."""
    lines = []
    for key, manifest in summary.datasets.items():
        counts = manifest.counts
        name = summary.layout.dataset(key)
        files = ".bin and .idx" if manifest.merged else ".data-args.txt for --data-args-path"
        lines.append(f"{name}{files}: {counts.documents:,} documents, {counts.tokens:,} tokens")
    left_out = [
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in asdict(summary.counts).items()
        if count and name not in ("read", "documents", "tokens")
    ]
    return "\n".join([*lines, *([f"left out: {', '.join(left_out)}"] if left_out else [])])


def main(arguments: list[str]) -> None:
    """Run the command line; exit with code 2 if the input is wrong."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error("the same command goes on; finished shards are kept"):
        summary = preprocess(settings_of(args))
        print("this stage is done" if summary is None else report(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
