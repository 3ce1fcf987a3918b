"""Parse the command lines of tools/score_with_model.py and tools/import_scores.py."""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from megatron_slm.errors import UserError
from megatron_slm.parser import Parser

LARGEST = float.fromhex("0x1.fffffep127")  # finite number of 32 bits

# What each value of a kind must be.
MUST_BE = {
    "reference": "a loss, finite and from 0 on",
    "external": "a finite number of 32 bits",
    "mask": "0 or 1",
}


def scoring_parser(about: str | None) -> Parser:
    """Build the parser of tools/score_with_model.py."""
    parser = _parser(about)
    add = parser.add_argument
    add("--model", metavar="DIR", help="A causal language model that transformers can load.")
    add(
        "--server",
        metavar="URL",
        help="An OpenAI-compatible server in its place, such as http://127.0.0.1:8000/v1. Its key, "
        "if it needs one, is read from OPENAI_API_KEY.",
    )
    add("--server-model", metavar="NAME", help="Default: the first that the server lists.")
    add(
        "--model-tokenizer",
        metavar="PATH",
        help="The model's tokenizer: a directory or tokenizer.json. Default: the one in --model.",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="What the model computes in. Default: what its weights are in.",
    )
    add(
        "--batch-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="Tokens that a GPU scores at once. Default: 8192.",
    )
    add(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="Requests at a time, of each rank. Default: 8.",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="How long to wait for an answer of the server. Default: 600.",
    )
    add(
        "--data-path",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="The datasets, without .bin and .idx.",
    )
    _add_cache(parser)
    return parser


def import_parser(about: str | None) -> Parser:
    """Build the parser of tools/import_scores.py."""
    parser = _parser(about)
    add = parser.add_argument
    add("file", nargs="+", help="jsonl (also .gz, .zst) or parquet files of values, in this order.")
    add(
        "--as",
        dest="kind",
        choices=("reference", "external", "mask"),
        required=True,
        help="reference: losses in nats. external: values for a score. mask: 1 for tokens that may "
        "count, 0 for those that may not.",
    )
    add(
        "--default",
        type=float,
        metavar="X",
        help="Value of tokens and documents that the files say nothing of. Without it they are an "
        "error.",
    )
    add(
        "--data-path",
        nargs=1,
        required=True,
        metavar="PREFIX",
        help="The dataset, without .bin and .idx.",
    )
    _add_cache(parser)
    return parser


def _parser(about: str | None) -> Parser:
    return Parser(description=about, formatter_class=RawDescriptionHelpFormatter)


def _add_cache(parser: Parser) -> None:
    add = parser.add_argument
    add("--tokenizer-type", required=True, metavar="TYPE", help="As for training.")
    add("--tokenizer-model", metavar="PATH", help="As for training.")
    add("--vocab-size", type=int, metavar="N", help="As for training, for NullTokenizer.")
    add(
        "--seq-length",
        type=int,
        default=4096,
        metavar="N",
        help="Tokens of a record, and tokens that a model reads at once. Training may have "
        "another. Default: 4096.",
    )
    add("--slm-reference-cache", required=True, metavar="DIR", help="The score cache to write.")
    add(
        "--cache-dtype",
        choices=("uint16", "float32"),
        help="As for tools/score_reference.py. Default: uint16; external values are float32.",
    )
    add(
        "--shard-samples",
        type=int,
        metavar="N",
        help="Records in a file; by default, chosen by how many there are.",
    )


def outside_arguments(parser: Parser, command: Sequence[str]) -> Namespace:
    """Parse a command line of either tool.

    Raises:
        UserError: an option is wrong, missing, or contradicts another.
    """
    args = parser.parse_args(command)
    for name in "seq_length shard_samples batch_tokens concurrency timeout vocab_size".split():
        value = getattr(args, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
    external = getattr(args, "kind", None) == "external"
    if args.cache_dtype is None:
        args.cache_dtype = "float32" if external else "uint16"
    elif external and args.cache_dtype != "float32":
        raise UserError("--cache-dtype uint16: external values, which may be negative, are float32")
    if getattr(args, "default", None) is not None:
        _check_default(args.kind, args.default)
    if "server" in args:
        if (args.model is None) == (args.server is None):
            raise UserError("name what scores: either --model DIR or --server URL")
        if args.server is not None and args.model_tokenizer is None:
            raise UserError("--server needs --model-tokenizer, the tokenizer of the server's model")
    return args


def _check_default(kind: str, default: float) -> None:
    """Check that values of a kind may be the default."""
    may_be = {
        "reference": 0.0 <= default <= LARGEST,
        "external": abs(default) <= LARGEST,
        "mask": default in (0.0, 1.0),
    }[kind]
    if not may_be:
        raise UserError(f"--default {default:g}: with --as {kind} it must be {MUST_BE[kind]}")
