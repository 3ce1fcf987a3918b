"""Make a score cache by document of values that another program gave a dataset's tokens.

    python tools/import_scores.py values.jsonl --as reference --data-path PREFIX \
        --tokenizer-type TYPE --tokenizer-model PATH --slm-reference-cache CACHE

The files have a JSON object a line, or a parquet row, for each document:

    document       its number in the dataset, from 0; without it, the records' order counts
    values         one number for each of its tokens, or null
    spans          [first character, character after the last, number] each, or
    token_spans    the same with tokens; exactly one of these three is given
    tokens, tokens_sha256, text    what it must have: its ids, their SHA-256 as int32, its text

All is checked against the dataset before anything is written.
"""

from __future__ import annotations

import sys

from megatron_slm.errors import exit_on_user_error
from megatron_slm.jobs.outside.command_line import import_parser, outside_arguments


def main(command: list[str]) -> None:
    """Import the files that the command line names."""
    with exit_on_user_error():
        args = outside_arguments(import_parser(__doc__), command)
        # After the command line is known to be right: this imports torch and Megatron.
        from megatron_slm.jobs.outside.import_values import import_scores

        import_scores(args)


if __name__ == "__main__":
    main(sys.argv[1:])
