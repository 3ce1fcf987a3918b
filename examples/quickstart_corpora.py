"""Make three corpora for quickstart.sh, as jsonl, from the Python installation that runs it.

    clean.jsonl    prose: the language reference (pydoc topics) and long docstrings
    target.jsonl   held-out prose of the same kind
    noisy.jsonl    raw source files: prose scattered among code, tables and licences

A module whose docstrings are in target.jsonl is in neither of the other two.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_slm.errors import exit_on_user_error
from megatron_slm.files import write_whole

LEAST = 200  # characters; shorter docstrings say little
HELD_OUT_EVERY = 10
NOISY_CHARACTERS = 6_000_000


def source_files() -> list[Path]:
    """Return the standard library's modules in a fixed order, without tests and applications."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    found = [path for path in library.rglob("*.py") if not skip & set(path.parts)]
    # Ordering by a hash of the name mixes the parts of the library.
    return sorted(found, key=lambda path: hash_of(path.relative_to(library).as_posix()))


def hash_of(text: str) -> int:
    """Hash a text; unlike hash(), the result is the same on every machine and in every run."""
    value = 0
    for byte in text.encode():
        value = (value * 16_777_619 ^ byte) & 0xFFFFFFFF
    return value


def docstrings(source: str) -> Iterator[str]:
    """Yield the long docstrings of a module and of everything it defines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and len(text) >= LEAST:
                yield text


def main(directory: Path) -> None:
    """Write the three corpora to `directory`."""
    from pydoc_data.topics import topics

    clean: list[str] = []
    target: list[str] = []
    noisy: list[str] = []
    for number, text in enumerate(topics[name] for name in sorted(topics)):
        (target if number % HELD_OUT_EVERY == 0 else clean).append(text)
    room = NOISY_CHARACTERS
    for number, path in enumerate(source_files()):
        try:
            source = path.read_text(encoding="utf-8")
            texts = list(docstrings(source))
        except (UnicodeDecodeError, SyntaxError):
            continue
        if number % HELD_OUT_EVERY == 0:
            target += texts
            continue
        clean += texts
        if source and room > 0:
            noisy.append(source[:room])
            room -= len(source)
    directory.mkdir(parents=True, exist_ok=True)
    for name, documents in (("clean", clean), ("target", target), ("noisy", noisy)):
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        write_whole(directory / f"{name}.jsonl", "".join(lines).encode())
        size = sum(map(len, documents)) / 1e6
        print(f"  {name:7}{len(documents):6} documents {size:6.2f} million characters")


if __name__ == "__main__":
    with exit_on_user_error():
        main(Path(sys.argv[1]))
