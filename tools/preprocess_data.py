"""Tokenize jsonl files into Megatron indexed datasets, PREFIX_KEY_document.bin and .idx.

Options bear the names and defaults that they have in Megatron-LM's tools/preprocess_data.py.
Give the tokenizer the same options here as in training, and it gives the same tokens.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from megatron_slm.data.preprocess import PreprocessSettings, Summary, preprocess
from megatron_slm.errors import exit_on_user_error

# Megatron's tokenizers of plain text.
TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "NullTokenizer",
)

# Megatron's options that decide which token ids a text becomes.
TOKENIZER_OPTIONS: dict[str, dict[str, Any]] = {
    "--tokenizer-type": {
        "required": True,
        "choices": TOKENIZER_TYPES,
        "help": "NullTokenizer reads texts that are token ids already, with spaces between.",
    },
    "--tokenizer-model": {
        "metavar": "PATH",
        "help": "SentencePiece or TikToken model file; directory or name on the Hub for "
        "HuggingFaceTokenizer.",
    },
    "--vocab-size": {"type": int, "metavar": "N", "help": "For NullTokenizer and TikTokenizer."},
    "--vocab-file": {"metavar": "FILE"},
    "--merge-file": {"metavar": "FILE"},
    "--tokenizer-metadata": {"dest": "metadata_path", "metavar": "FILE"},
    "--tokenizer-special-tokens": {"dest": "special_tokens", "nargs": "+", "metavar": "TOKEN"},
    "--tokenizer-sentencepiece-legacy": {"action": "store_true"},
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces": {
        "dest": "tokenizer_sentencepiece_ignore_extra_whitespaces",
        "action": "store_false",
    },
    "--tokenizer-hf-no-use-fast": {"action": "store_true"},
    "--tokenizer-hf-no-include-special-tokens": {
        "action": "store_true",
        "help": "Leave out tokens that a Hugging Face tokenizer puts around every text.",
    },
    "--trust-remote-code": {
        "action": "store_true",
        "help": "Run code that comes with a Hugging Face tokenizer.",
    },
    "--tiktoken-pattern": {"choices": ("v1", "v2")},
    "--tiktoken-num-special-tokens": {"type": int, "default": 1000, "metavar": "N"},
    "--null-tokenizer-eod-id": {"type": int, "metavar": "ID"},
}


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="jsonl: one JSON object a line, in UTF-8. Several files are read in this order.",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="Path up to _KEY_document.bin.")
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="Keys whose strings are the documents; each key makes one dataset. Default: text.",
    )
    add("--append-eod", action="store_true", help="End documents with the end-of-document token.")
    add("--workers", type=int, default=1, metavar="N", help="Processes that tokenize. Default: 1.")
    add(
        "--log-interval",
        type=int,
        default=1000,
        metavar="N",
        help="Documents between lines of progress on stderr. Default: 1000.",
    )
    tokenizer = parser.add_argument_group("tokenizer, as in training")
    for name, options in TOKENIZER_OPTIONS.items():
        tokenizer.add_argument(name, **options)
    # build_tokenizer() reads these too; neither changes how text is tokenized.
    parser.set_defaults(chat_template=None, pad_vocab_size=False)
    return parser


def report(summary: Summary) -> str:
    """One line for each dataset written."""
    lines = []
    for dataset in summary.datasets:
        empty = summary.documents - dataset.documents
        lines.append(
            f"wrote {dataset.prefix}.bin and .idx: {dataset.documents} documents, "
            f"{dataset.tokens} tokens, {dataset.tokens / summary.seconds:.0f} tokens/s "
            f"(skipped: {empty} empty documents, {summary.blank_lines} blank lines)"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Do what the command line says; exit with code 2 on bad input."""
    args: Namespace = build_parser().parse_args(arguments)
    with exit_on_user_error():
        settings = PreprocessSettings(
            inputs=tuple(args.input),
            output_prefix=args.output_prefix,
            tokenizer=args,
            json_keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            workers=args.workers,
            log_interval=args.log_interval,
        )
        print(report(preprocess(settings)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports Ctrl-C
