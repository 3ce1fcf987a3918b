"""Files that a stranger could have written, in processes of bounded memory and time: each gives one
line that names it, and exit code 2."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from corpus import ENGINE, MODEL, preprocess, write_jsonl
from launch import PYTHONPATH, SUPPORT

TIMEOUT = 600  # seconds, for all of them
DEEP = b"[" * 100_000
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@dataclass
class Case:
    """What is run, and what it is to say: nothing if it is right."""

    command: list[object]
    says: str


Make = Callable[[Path], Case]


def preprocessing(directory: Path, *more: object, source: object = None) -> list[object]:
    given = source or directory / "in.jsonl"
    command = ["preprocess_data", "--input", given, "--output-prefix", directory / "out"]
    return [*command, "--tokenizer-model", MODEL, *ENGINE, "--workers", 1, *more]


def packed(pieces: Iterator[bytes]) -> bytes:
    stream = zstandard.ZstdCompressor(level=3).compressobj()
    return b"".join([*map(stream.compress, pieces), stream.flush()])


def repeated(piece: bytes, times: int) -> Callable[[], bytes]:
    """Compress a good line and 16 MiB of a piece, repeated, into a few kilobytes."""

    def make() -> bytes:
        block = piece * ((16 << 20) // len(piece))
        return packed(part for part in [b'{"text": "good"}\n', *[block] * times])

    return make


def parquet(size: int, rows: int) -> Callable[[], bytes]:
    """Rows of one text of so many MiB: as a dictionary of it if there are several."""

    def make() -> bytes:
        sink = pyarrow.BufferOutputStream()
        values: Any = pyarrow.array(["x" * (size << 20)])
        if rows > 1:
            values = pyarrow.DictionaryArray.from_arrays([0] * rows, values)
        options: Any = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False}
        options |= {"compression": "zstd", "use_dictionary": rows > 1}
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), sink, **options)
        return bytes(sink.getvalue().to_pybytes())

    return make


def window(log: int) -> bytes:
    """Make the header of a zstd frame with a window of this size, and a block of five bytes."""
    return bytes.fromhex("28b52ffd 00") + bytes([(log - 10) << 3]) + b"\x29\0\0hello"


INPUTS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "268 million blank lines": ("in.jsonl.zst", repeated(b"\n", 16), ""),
    "blank lines with spaces": ("in.jsonl.zst", repeated(b" \r\n", 4), ""),
    "a line of 256 MiB": ("in.jsonl.zst", repeated(b"x", 16), "in.jsonl.zst:2: longer than"),
    "a line of spaces": (
        "in.jsonl.gz",
        lambda: gzip.compress(b" " * (100 << 20), 1),
        "in.jsonl.gz:1: longer than",
    ),
    "a window of 2 GiB": ("in.jsonl.zst", lambda: window(31), "in.jsonl.zst:1: not JSON"),
    "a window of 1 TiB": ("in.jsonl.zst", lambda: window(40), "more memory to unpack"),
    "a hundred thousand frames": (
        "in.jsonl.zst",
        lambda: bytes.fromhex("502a4d18 00000000") * 100_000,
        "no document has any text",
    ),
    "a dictionary of one long value": (
        "in.parquet",
        parquet(65, 20),
        "in.parquet:1: 'text' is longer than",
    ),
    "a page of one long value": (
        "in.parquet",
        parquet(130, 1),
        "in.parquet:1: 'text' is longer than",
    ),
    "parquet without a footer": (
        "in.parquet",
        lambda: b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1",
        "cannot be read as parquet",
    ),
    "nested deep": ("in.jsonl", lambda: b'{"text": ' + DEEP + b"\n", "in.jsonl:1: not JSON"),
}


def an_input(name: str, content: Callable[[], bytes], says: str) -> Make:
    def make(directory: Path) -> Case:
        (directory / name).write_bytes(content())
        return Case(preprocessing(directory, source=directory / name), says)

    return make


def a_device(path: str) -> Make:
    return lambda directory: Case(preprocessing(directory, source=path), f"{path} is not a regular")


def evaluation_set(content: bytes | None, says: str) -> Make:
    def make(directory: Path) -> Case:
        write_jsonl(directory / "in.jsonl", ["good"])
        given = directory / "evaluation.jsonl"
        given.write_bytes(content) if content is not None else os.mkfifo(given)
        return Case(preprocessing(directory, "--decontaminate", given), says)

    return make


EVALUATION = {
    "a set of 900 levels": evaluation_set(b"[" * 900 + f'"{LONG}"'.encode() + b"]" * 900, ""),
    "a set nested deep": evaluation_set(b"{}\n" + DEEP, "evaluation.jsonl:2: not JSON"),
    "a set that is a pipe": evaluation_set(None, "evaluation.jsonl is not a regular file"),
}

ENDLESS = "for each of 3 conversations"
TEMPLATES = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}.{% endfor %}{% endfor %}",)
    * 2,
    "a product": "{{ messages[0].content * 10**11 }}",
    "a constant product": "{{ 'a' * 10**11 }}",
    "a power": "{{ 9 ** (9 ** (messages | length + 8)) }}",
    "a method that pads": "{{ messages[0].content.center(10**11) }}",
    "a filter that pads": "{{ messages[0].content | center(10**11) }}",
    "a format that pads": "{{ '%99999999999d' % 1 }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a long list": "{{ ([1] * 10**11) | length }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "parentheses": "{{ " + "(" * 200_000 + "1" + ")" * 200_000 + " }}",
    "signs": "{{ " + "-" * 200_000 + "1 }}",
    "sums": "{{ 1" + "+1" * 200_000 + " }}",
    "too long": "x" * (1 << 21),
    "not UTF-8": "\udcff",
    "a number of 100,000 digits": "{{ " + "9" * 100_000 + " }}",
    "itself for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
SAID = {
    "parentheses": "nested too deeply",
    "signs": "nested too deeply",
    "sums": "nested too deeply",
    "too long": "more than 1048576 bytes",
    "not UTF-8": "cannot be read",
    "a number of 100,000 digits": "cannot be read",
    "itself for ever": "in.jsonl:1: the chat template cannot render it",
}


def template(kind: str) -> Make:
    def make(directory: Path) -> Case:
        text = TEMPLATES[kind]
        written = text if isinstance(text, str) else text[0]
        path = directory / "a.jinja"
        path.write_text(written, encoding="utf-8", errors="surrogateescape")
        chat = [{"role": "user", "content": "Hello"}]
        (directory / "in.jsonl").write_text((json.dumps({"text": chat}) + "\n") * 5)
        return Case(preprocessing(directory, "--chat-template", path), SAID.get(kind, ENDLESS))

    return make


RECIPES = {
    "a ratio of a billion digits": ("ratio: 1e999999999", "$.sources[0].ratio"),
    "a ratio over zero": ("ratio: 1/0", "$.sources[0].ratio"),
    "a ratio of nothing": ("ratio: .nan", "$.sources[0].ratio"),
    "a ratio without an end": ("ratio: .inf", "$.sources[0].ratio"),
    "a ratio of many digits": (f"ratio: {'9' * 4000}", "$.sources[0].ratio"),
    "a ratio that is a list": ("ratio: [1]", "$.sources[0].ratio"),
    "a list for a name": ("name: [a]", "$.sources[0].name"),
    "a number for a path": ("data: 5", "$.sources[0].data"),
    "a path with NUL": (r'data: "a\0b"', "$.sources[0].data"),
    "a path that is half a character": (r'data: "\ud800"', "$.sources[0].data"),
    "no paths": ("data: []", "$.sources[0].data"),
    "a name of two lines": (r'name: "a\nb"', "$.sources[0].name"),
    "an alias": ("domain: &a [x]\n    name: *a", "alias"),
    "an object of Python": ("name: !!python/object/apply:os.getcwd []", "recipe.yaml"),
}
HEADS = {
    "epochs that are no number": ("max_epochs: .nan", "$.max_epochs"),
    "a budget of text": ("budget: 80B", "$.budget"),
    "a budget of many digits": (f"budget: {'9' * 400}", "$.budget"),
    "a budget that is true": ("budget: true", "$.budget"),
    "nested brackets": (f"budget: {'[' * 3000}", "nested too deeply"),
    "no sources": ("sources: null", "$.sources"),
    "a mapping for the sources": ("sources: {name: a}", "$.sources"),
}


def recipe(kind: str) -> Make:
    def make(directory: Path) -> Case:
        entry: dict[str, str] = {"name": "name: a", "data": "data: x"}
        head = {"budget": "budget: 5"}
        text, says = (RECIPES | HEADS)[kind]
        (entry if kind in RECIPES else head)[text.partition(":")[0]] = text
        fields = "\n    ".join(entry.values())
        head.setdefault("sources", f"sources:\n  - {fields}")
        path = directory / "recipe.yaml"
        path.write_text("\n".join(head.values()))
        return Case(["build_mix", path, "--output-prefix", directory / "mix"], says)

    return make


# Where in a dataset's manifest, what is put there, and what is said.
MANIFESTS: dict[str, tuple[str, object, str]] = {
    "a vocabulary of text": ("options.tokenizer.vocab_size", "x", "$.options.tokenizer.vocab_size"),
    "a vocabulary of nothing": ("options.tokenizer.vocab_size", 0, "vocab_size"),
    "no shards": ("shards", [], "$.shards"),
    "null for shards": ("shards", None, "$.shards"),
    "a number for shards": ("shards", 5, "$.shards"),
    "null for options": ("options", None, "$.options"),
    "a list for options": ("options", [], "$.options"),
    "a size of text": ("bin.size", "5", "$.bin.size"),
    "a size below zero": ("bin.size", -5, "$.bin.size"),
    "a size of half a byte": ("idx.size", 0.5, "$.idx.size"),
    "text for merged": ("merged", "true", "$.merged"),
    "too many documents": ("counts.documents", 7, "its counts are"),
    "a shard of other sizes": ("shards.0.outputs.text.bin.size", 2, "but its shards have"),
    "a shard of more tokens": ("shards.0.outputs.text.tokens", 10**12, "its counts are"),
    "a shard without outputs": ("shards.0.outputs", {}, "$.shards[0].outputs"),
    "a shard of text": ("shards.0", "x", "$.shards[0]"),
    "a filter of one": ("options.filters", [["x"]], "$.options.filters[0]"),
    "another key": ("shards.0.options.json_keys", ["q"], "of other keys: text"),
    "an input with NUL": ("shards.0.inputs.0.path", "a\0b", "$.shards[0].inputs[0].path"),
    "an input from below zero": ("shards.0.inputs.0.start", -1, "$.shards[0].inputs[0].start"),
    "an input beyond its end": ("shards.0.inputs.0.start", 10**12, "begins behind its end"),
    "an input that is a device": ("shards.0.inputs.0.path", "/dev/zero", "/dev/zero is not a"),
    "ids for true": ("options.append_eod", True, "$.options.append_eod"),
    "another format": ("format", 2, "not a manifest of format"),
}


def manifest(kind: str, tool: str = "verify_dataset") -> Make:
    def make(directory: Path) -> Case:
        field, value, says = MANIFESTS[kind]
        prefix = directory / "out_text_document"
        path = directory / "out_text_document.manifest.json"
        content = json.loads(path.read_text())
        *outer, last = field.split(".")
        inner = content
        for name in outer:
            inner = inner[int(name) if name == "0" else name]
        inner[0 if last == "0" else last] = value
        path.write_text(json.dumps(content))
        return Case([tool, prefix, "--deep", "--tokenizer-model", MODEL], says)

    return make


def other_manifest(content: bytes | None, says: str) -> Make:
    def make(directory: Path) -> Case:
        path = directory / "out_text_document.manifest.json"
        path.unlink()
        path.write_bytes(content) if content is not None else os.mkfifo(path)
        return Case(["verify_dataset", directory / "out_text_document"], says)

    return make


def unmerged(change: Callable[[dict[str, Any]], object], says: str) -> Make:
    """Change the dataset's manifest so that its shards seem not to be merged."""

    def make(directory: Path) -> Case:
        path = directory / "out_text_document.manifest.json"
        content = json.loads(path.read_text()) | {"merged": False}
        change(content)
        path.write_text(json.dumps(content))
        return Case(["verify_dataset", directory / "out_text_document"], says)

    return make


def piped_index(directory: Path) -> Case:
    path = directory / "out_text_document.idx"
    path.unlink()
    os.mkfifo(path)
    return Case(["verify_dataset", directory / "out_text_document"], "not a regular file")


def damaged_rejects(directory: Path) -> Case:
    """Damage the list of rejects of a shard that is kept."""
    source = directory / "in.jsonl"
    source.write_bytes(source.read_bytes() + b"{\n")
    assert preprocess(source, directory / "out", check=False).code == 2
    (path,) = (directory / "out_rejects").iterdir()
    path.write_bytes(DEEP)
    return Case(preprocessing(directory), f"{path} cannot be read")


def again(directory: Path) -> Case:
    """Run again over a manifest that makes no sense."""
    made = manifest("a vocabulary of text")(directory)
    return Case(preprocessing(directory), made.says)


DATASETS: dict[str, Make] = {
    "a manifest nested deep": other_manifest(b'{"format": 1, "x": ' + DEEP, "nested too deeply"),
    "a manifest that is a list": other_manifest(b"[1]", "Expected `object`"),
    "a manifest that is a pipe": other_manifest(None, "not a regular file"),
    "an empty manifest": other_manifest(b"", "cannot be read"),
    "a shard out of the directory": unmerged(
        lambda content: content["shards"][0].update(name="../../x"), "not inside the directory"
    ),
    "shards of nothing": unmerged(
        lambda content: [
            content["counts"].update(documents=0),
            content["shards"][0]["outputs"]["text"].update(documents=0),
        ],
        "its counts are",
    ),
    "an index that is a pipe": piped_index,
    "a list of rejects nested deep": damaged_rejects,
    "a manifest of nonsense in a rerun": again,
}


def tokenizer(name: str, content: bytes | None, says: str, config: bytes | None = None) -> Make:
    def make(directory: Path) -> Case:
        write_jsonl(directory / "in.jsonl", ["good"])
        path = directory / name
        path.write_bytes(content) if content is not None else os.mkfifo(path)
        if config is not None:
            (directory / "tokenizer_config.json").write_bytes(config)
        return Case(preprocessing(directory, "--tokenizer-model", path, "--engine", "auto"), says)

    return make


def piped_directory(directory: Path) -> Case:
    write_jsonl(directory / "in.jsonl", ["good"])
    (directory / "tokenizer").mkdir()
    os.mkfifo(directory / "tokenizer" / "tokenizer.json")
    given = ("--tokenizer-model", directory / "tokenizer", "--engine", "auto")
    return Case(preprocessing(directory, *given), "not a regular file")


WORDS = b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'
TOKENIZERS: dict[str, Make] = {
    "no bytes": tokenizer("a.model", b"", "a vocabulary of 0 tokens"),
    "garbage": tokenizer("a.model", b"\xff" * 5000, "no tokenizer that can be read"),
    "half a model": tokenizer("a.model", MODEL.read_bytes()[:250_000], "no tokenizer"),
    "a model that is a pipe": tokenizer("a.model", None, "not a regular file"),
    "a tokenizer.json nested deep": tokenizer("tokenizer.json", b'{"model": ' + DEEP, "too deeply"),
    "a model of nothing": tokenizer("tokenizer.json", b'{"model": null}', "no tokenizer that can"),
    "a model of text": tokenizer("tokenizer.json", b'{"model": "x"}', "no tokenizer that can be"),
    "a config that is a list": tokenizer("tokenizer.json", WORDS, "Expected `object`", b"[]"),
    "a config of numbers": tokenizer("tokenizer.json", WORDS, "bos_token", b'{"bos_token": 5}'),
    "a config nested deep": tokenizer("tokenizer.json", WORDS, "too deeply", b'{"x": ' + DEEP),
    "tekken of a trillion tokens": tokenizer(
        "tekken.json",
        b'{"vocab": [], "config": {"default_vocab_size": 9, "default_num_special_tokens": '
        b'1000000000000, "pattern": "x", "version": "v3", "num_vocab_tokens": 9}}',
        "default_num_special_tokens",
    ),
    "tekken of text": tokenizer("tekken.json", b'{"vocab": "x", "config": {}}', "$.vocab"),
    "a directory with a pipe": piped_directory,
    "a device for a tokenizer": lambda directory: Case(
        preprocessing(directory, "--tokenizer-model", "/dev/zero", source=str(MODEL)),
        "not a regular file",
    ),
}


CASES: dict[str, Make] = {
    **{kind: an_input(*case) for kind, case in INPUTS.items()},
    **{f"{path} as input": a_device(path) for path in ("/dev/zero", "/dev/null")},
    **EVALUATION,
    **{f"template: {kind}": template(kind) for kind in TEMPLATES},
    **{f"recipe: {kind}": recipe(kind) for kind in (*RECIPES, *HEADS)},
    **{f"manifest: {kind}": manifest(kind) for kind in MANIFESTS},
    **DATASETS,
    **{f"tokenizer: {kind}": make for kind, make in TOKENIZERS.items()},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, int, str]]:
    """Run every case in one process, and return what each says."""
    directory = tmp_path_factory.mktemp("strangers")
    dataset = directory / "dataset"
    dataset.mkdir()
    source = write_jsonl(dataset / "in.jsonl", ["one", "two two"])
    preprocess(source, dataset / "out")
    cases = {}
    for at, (kind, make) in enumerate(CASES.items()):
        own = directory / str(at)
        own.mkdir()
        if kind.startswith("manifest") or kind in DATASETS:
            shutil.copytree(dataset, own, dirs_exist_ok=True)
        cases[kind] = make(own)
    script = SUPPORT / "bounded_runs.py"
    run = subprocess.run(
        [sys.executable, script],
        input=json.dumps([[str(word) for word in case.command] for case in cases.values()]),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {
        kind: (case, code, err)
        for (kind, case), (code, err) in zip(cases.items(), lines, strict=True)
    }


@pytest.mark.parametrize("kind", CASES)
def test_one_line_within_bounds(kind: str, found: dict[str, tuple[Case, int, str]]) -> None:
    case, code, err = found[kind]
    assert code == (2 if case.says else 0), err[-2000:]
    assert "Traceback" not in err
    if case.says:
        last = err.splitlines()[-1]
        assert last.startswith("error: ") and case.says in last
        assert err.count("error: ") == 1
