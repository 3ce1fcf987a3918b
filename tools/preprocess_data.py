"""Tokenize corpora into Megatron indexed datasets, PREFIX_KEY_document.bin and .idx.

Options that Megatron-LM's tools/preprocess_data.py has bear its names.  All cores are used, memory
is bounded, and a run that was killed goes on where it was when the same command is given again.
The shards that cores write are merged into one pair of files, whatever their number, since a blend
of thousands of datasets makes training start slowly; --no-merge keeps them as a set.
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
    """FIELD=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return name, value


def byte_count(text: str) -> int:
    """A number of bytes, such as 256M."""
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        return int(text if unit == 1 else text[:-1]) * unit
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a number of bytes, such as 256M") from error


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add_input_options(parser)
    add_tokenizer_options(parser)
    add_cleaning_options(parser)
    add_run_options(parser)
    return parser


def add_input_options(parser: ArgumentParser) -> None:
    """What is read and written."""
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), directories, quoted glob patterns, "
        "or - for jsonl from standard input. Read in this order, directories and patterns sorted.",
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
        help="Take only records whose field is that; a dotted path reaches inside. Repeated: all.",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template that makes a text of the list of messages under the key.",
    )
    group.add_argument("--domain", metavar="NAME", help="Recorded in the manifest, for mixes.")


def add_tokenizer_options(parser: ArgumentParser) -> None:
    """How text becomes ids."""
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
        help="As in training. Default: told from the file.",
    )
    group.add_argument(
        "--engine",
        choices=["auto", *engine_names()],
        default="auto",
        help="What tokenizes. auto: the fastest that is installed and gives the ids of the "
        "tokenizer's own library on the first documents of up to 64 of the shards to be made; that "
        "library if there are none. Shards of another engine than the one named are made again.",
    )
    group.add_argument("--append-eod", action="store_true", help="End documents with that token.")
    group.add_argument(
        "--prepend-bos", action="store_true", help="Begin documents with that token."
    )
    group.add_argument(
        "--special-tokens-in-text",
        choices=["text", "ids"],
        default="text",
        help="What the text of a control or special token (a literal </s>) in a document becomes: "
        "the tokens of its letters, or its id. Other pieces of the vocabulary are always ids, also "
        "user-defined ones of sentencepiece and added tokens of Hugging Face that are not special.",
    )


def add_cleaning_options(parser: ArgumentParser) -> None:
    """What is left out."""
    group = parser.add_argument_group("cleaning")
    group.add_argument(
        "--dedup",
        choices=["exact", "near"],
        help="Drop documents with the text of an earlier one, or (near) nearly its words.",
    )
    group.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Evaluation sets (jsonl): drop documents that share 13 words in a row with them.",
    )
    group.add_argument(
        "--max-reject-fraction",
        type=float,
        default=1e-4,
        metavar="F",
        help="Fail if more than this part of the documents cannot be used, of all that are read, "
        "also those a filter leaves out. They are listed in PREFIX_rejects in any case. "
        "Default: 1e-4.",
    )


def add_run_options(parser: ArgumentParser) -> None:
    """Where it runs."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="Processes, one a core. Default: all cores.",
    )
    group.add_argument(
        "--shard-size",
        type=byte_count,
        default="256M",
        metavar="BYTES",
        help="Input of a task, which is what is done again after a crash; compressed and parquet "
        "files are never cut, however large. Default: 256M.",
    )
    group.add_argument("--merge", action=BooleanOptionalAction, default=True)
    group.add_argument(
        "--stage", choices=STAGES, default="all", help="Only this, for Slurm arrays."
    )
    group.add_argument("--rank", type=int, default=0, metavar="R", help="Of the machine or job.")
    group.add_argument("--world-size", type=int, default=1, metavar="N")


def settings_of(args: Namespace) -> PreprocessingSettings:
    """The command line's meaning."""
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
    """What was written, and what was left out."""
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
    """Do what the command line says; exit with code 2 on bad input."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error("the same command goes on; finished shards are kept"):
        summary = preprocess(settings_of(args))
        print("this stage is done" if summary is None else report(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
