"""Write the share of letters in each line of a corpus's documents, for tools/import_scores.py.

    python examples/experiments/letters.py corpus.jsonl values.jsonl

It stands for a classifier: tables, rules and code have few letters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(corpus: str, values: str) -> None:
    """Write a record for each document."""
    records = []
    for line in Path(corpus).read_text().rstrip("\n").split("\n"):
        spans, start = [], 0
        for part in json.loads(line)["text"].splitlines(keepends=True):
            share = sum(map(str.isalpha, part)) / len(part)
            spans.append([start, start + len(part), round(share, 3)])
            start += len(part)
        records.append(json.dumps({"spans": spans}) + "\n")
    Path(values).write_text("".join(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
