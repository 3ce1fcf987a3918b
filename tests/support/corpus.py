"""Small corpora of real text, and the data tools run in this process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import sentencepiece

from real_text import docstrings

TOOLS = Path(__file__).parents[2] / "tools"
MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
ENGINE = ("--engine", "sentencepiece")
TOKENIZER = ("--tokenizer-model", MODEL)
MODULES = (
    "argparse ast difflib inspect logging/__init__ os statistics string tarfile typing".split()
)

Document = tuple[int, ...]


def texts() -> list[str]:
    """About 900 docstrings, and what tokenizers find hard."""
    hard = "naïve 東京 🎲  two  spaces\n\ttab\u2028separator\x1fcontrol\u0000nul ▁ </s><s> <0x0A>"
    return [*docstrings(MODULES), hard, "x", " ", "\n"]


def ids_of(text: str, *, eod: bool = True) -> Document:
    """Tokenize a text with sentencepiece itself."""
    return (*PIECES.encode(text), *([PIECES.eos_id()] if eod else []))


def write_jsonl(path: Path, found: Iterable[str], **fields: Any) -> Path:
    lines = [
        json.dumps({"id": at, "text": text, **fields}, ensure_ascii=at % 2 == 0)
        for at, text in enumerate(found)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_dataset(prefix: Path | str) -> list[Document]:
    """Read the documents of an indexed dataset by its file format alone."""
    index = Path(f"{prefix}.idx").read_bytes()

    def numbers(dtype: Any, count: int, offset: int) -> list[int]:
        return [int(n) for n in np.frombuffer(index, dtype, count, offset)]

    assert index[:9] == b"MMIDIDX\0\0"
    assert int.from_bytes(index[9:17], "little") == 1
    dtype: Any = {4: np.dtype("<i4"), 8: np.dtype("<u2")}[index[17]]
    sequences, documents = numbers("<u8", 2, 18)
    lengths = numbers("<i4", sequences, 34)
    offsets = numbers("<i8", sequences, 34 + 4 * sequences)
    ends = numbers("<i8", documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert ends == list(range(sequences + 1)), "one sequence a document"
    data = Path(f"{prefix}.bin").read_bytes()
    assert len(data) == dtype.itemsize * sum(lengths)
    return [
        tuple(np.frombuffer(data, dtype, length, offset).tolist())
        for length, offset in zip(lengths, offsets, strict=True)
    ]


@dataclass
class Result:
    """Of a command."""

    code: int
    out: str
    err: str


def run_tool(name: str, *arguments: object) -> Result:
    """Run a tool in this process, which saves importing everything again."""
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def preprocess(source: object, prefix: Path, *more: object, check: bool = True) -> Result:
    """preprocess_data.py with one worker and the engine that loads fastest, unless more says
    otherwise."""
    sources: Sequence[object] = source if isinstance(source, list | tuple) else (source,)
    result = run_tool(
        "preprocess_data",
        *(
            "--input",
            *sources,
            "--output-prefix",
            prefix,
            *TOKENIZER,
            "--workers",
            1,
            *(*ENGINE, *more),
        ),
    )
    if check:
        assert result.code == 0, result.err
    return result


def left_behind(directory: Path, *inputs: Path) -> set[str]:
    """Names of files in a directory besides the inputs."""
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path not in inputs
    }
