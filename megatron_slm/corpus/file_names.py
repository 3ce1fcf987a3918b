"""Recognise this program's own files by names that only it gives, to tell output from input."""

from __future__ import annotations

import os
import re
from pathlib import Path

STDIN = "spooled-stdin.jsonl"
DECIDED = "datasets.next"
# How the names of this program's files begin: a task's name (inputs.py), or one of these.
TASK = r".+-[0-9a-f]{12}-\d{13,}"
OWN_NAMES = re.compile(rf"{TASK}[._]|duplicates\.verdicts|{re.escape(STDIN)}|{DECIDED}", re.DOTALL)
# How the names of its files end in other directories.
OUTPUT = re.compile(
    r"_document\.(bin|idx|bin\.next|idx\.next|manifest\.json)$|\.data-args\.txt$"
    r"|-[0-9a-f]{8}-\d+\.partial$"
)


def is_ours(path: Path) -> bool:
    """Return whether a file in the shards' or rejects' directory has a name that only this program
    gives."""
    return OWN_NAMES.match(path.name) is not None


def is_output(path: str) -> bool:
    """Return whether a file has a name that only this program gives, in whatever run."""
    directory, name = os.path.split(os.path.abspath(path))
    if directory.endswith(("_shards", "_rejects")) and OWN_NAMES.match(name):
        return True
    if OUTPUT.search(name):
        return True
    mix = path.removesuffix(".manifest.json")
    return mix != path and os.path.exists(f"{mix}.data-args.txt")
