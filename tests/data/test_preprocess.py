"""tools/preprocess_data.py against tokenizers called directly and a reader of our own."""

from __future__ import annotations

import ast
import errno
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
TIMEOUT = 120  # seconds
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}

Document = tuple[int, ...]


def read_dataset(prefix: Path) -> list[Document]:
    """The documents of an indexed dataset, by its file format and nothing else."""
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


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    lines = [
        json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    return process.returncode, out, err


def run(*arguments: object) -> tuple[int, str, str]:
    return finish(start(*arguments))


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """As run(), in this process, which spares the seconds that importing Megatron takes."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            load_tool().main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Docstrings of Python's standard library, and text in other scripts."""
    found: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:90]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found.append(ast.get_docstring(node, clean=False) or "")
    docstrings = [text for text in found if text.strip()]
    assert len(docstrings) > 1000
    return [*docstrings, "naïve 東京 🎲  two  spaces\n\ttab\u2028separator\x1fcontrol", "x"]


@pytest.fixture(scope="session")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama's: BPE with bytes for what is not in the vocabulary."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in texts),
        model_prefix=str(prefix),
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def pieces(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture
def sp_options(model: Path) -> list[object]:
    return ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", model]


def test_round_trip(
    texts: list[str],
    pieces: sentencepiece.SentencePieceProcessor,
    sp_options: list[object],
    tmp_path: Path,
) -> None:
    """Several files in order, empty documents and blank lines skipped, any number of workers."""
    first = write_jsonl(tmp_path / "first.jsonl", [*texts, "", *texts])
    second = write_jsonl(tmp_path / "second.jsonl", ["last but one", "last"])
    second.write_bytes(b"\n \r\n" + second.read_bytes().removesuffix(b"\n"))
    common = ["--input", first, second, *sp_options, "--append-eod", "--log-interval", 500]
    runs = [start(*common, "--output-prefix", tmp_path / f"out{n}", "--workers", n) for n in (1, 2)]
    for process in runs:
        code, out, err = finish(process)
        assert code == 0, err
        assert "docs/s" in err and "MB/s" in err

    read = read_dataset(tmp_path / "out1_text_document")
    assert read == [
        (*pieces.encode(text), pieces.eos_id()) for text in [*texts, *texts, "last but one", "last"]
    ]
    assert f"{len(read)} documents, {sum(map(len, read))} tokens" in out
    assert "1 empty documents, 2 blank lines" in out
    assert f"{tmp_path}/out2_text_document.bin and .idx" in out
    for suffix in ("bin", "idx"):
        one, two = (tmp_path / f"out{n}_text_document.{suffix}" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    assert len(list(tmp_path.iterdir())) == 6, "nothing temporary is left"

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(tmp_path / "out1_text_document"))
    assert [tuple(dataset[i].tolist()) for i in range(len(dataset))] == read
    assert dataset.document_indices.tolist() == list(range(len(read) + 1))


def test_two_keys_without_eod(
    texts: list[str],
    pieces: sentencepiece.SentencePieceProcessor,
    sp_options: list[object],
    tmp_path: Path,
    run_here: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(file: int) -> None:
        steps.append("fsync")
        sync(file)

    def recorded_replace(path: Path, target: Path) -> Path:
        steps.append(target.suffix)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    rows = [{"question": text, "answer": text[::-1]} for text in texts[:100]]
    rows[7]["answer"] = ""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    prefix = tmp_path / "out"
    keys = ["--json-keys", "question", "answer"]
    code, out, err = run_here("--input", data, "--output-prefix", prefix, *keys, *sp_options)
    assert code == 0, err
    for key in ("question", "answer"):
        assert read_dataset(tmp_path / f"out_{key}_document") == [
            tuple(pieces.encode(row[key])) for row in rows if row[key]
        ]
    assert "99 documents" in out and "100 documents" in out
    assert steps == ["fsync"] * 4 + [".bin"] * 2 + [".idx"] * 2


@pytest.mark.parametrize("special_tokens", [True, False])
def test_hugging_face_tokenizer(
    special_tokens: bool,
    texts: list[str],
    tmp_path: Path,
    run_here: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    wrapped = tokenizer_class(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "tokenizer")

    options: list[object] = ["--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
    options += ["--tokenizer-model", tmp_path / "tokenizer", "--workers", 2]
    if not special_tokens:
        options.append("--tokenizer-hf-no-include-special-tokens")
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    code, _, err = run_here("--input", data, "--output-prefix", tmp_path / "out", *options)
    assert code == 0, err
    assert read_dataset(tmp_path / "out_text_document") == [
        (*tokenizer.encode(text, add_special_tokens=special_tokens).ids, 1) for text in texts
    ]


def test_ids_beyond_16_bits(tmp_path: Path, run_here: Callable[..., tuple[int, str, str]]) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ["1 2 65535 65536 99999", "7"])
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 100_000]
    code, _, err = run_here("--input", data, "--output-prefix", tmp_path / "out", *null)
    assert code == 0, err
    assert read_dataset(tmp_path / "out_text_document") == [(1, 2, 65535, 65536, 99999), (7,)]


BAD_LINES = {
    "not JSON": (b'{"text": "cut off', "not JSON: Unterminated string"),
    "not an object": (b'["text"]', "not a JSON object but a list"),
    "no key": (b'{"content": "x"}', "no key 'text' among ['content']"),
    "not a string": (b'{"text": ["x"]}', "'text' is not a string but a list"),
    "null": (b'{"text": null}', "'text' is not a string but a NoneType"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "x"}', "not JSON: Unexpected UTF-8 BOM"),
    "half a surrogate pair": (b'{"text": "a\\ud800"}', "cannot be tokenized: UnicodeEncodeError"),
    "nested": (b"[" * 100_000, "JSON that cannot be read"),
    "long number": (b'{"text": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
    "not a number": (b'{"text": "12 three"}', "cannot be tokenized: ValueError"),
    "beyond the vocabulary": (b'{"text": "5 1000 7"}', "5 to 1000 are not all in the vocabulary"),
    "negative": (b'{"text": "5 -1"}', "token ids -1 to 5"),
    "beyond 64 bits": (b'{"text": "99999999999999999999"}', "are not all in the vocabulary"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line(kind: str, tmp_path: Path, run_here: Callable[..., tuple[int, str, str]]) -> None:
    line, message = BAD_LINES[kind]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    write_jsonl(good, ["1 2 3"] * 2500)
    bad.write_bytes(b'{"text": "4"}\n' * 1200 + b"\n" + line + b"\n" + b'{"text": "5"}\n{')
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 1000]
    code, out, err = run_here("--input", good, bad, "--output-prefix", tmp_path / "out", *null)
    assert code == 2
    assert f"error: {bad}:1202: " in err and message in err
    assert "Traceback" not in err and out == ""
    assert set(tmp_path.iterdir()) == {good, bad}


def test_bad_line_in_a_worker(texts: list[str], sp_options: list[object], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    with data.open("a") as stream:
        stream.write('{"text": "x"\n' + '{"text": "y"}\n' * 10_000)
    prefix = tmp_path / "out"
    code, out, err = run("--input", data, "--output-prefix", prefix, *sp_options, "--workers", 2)
    assert code == 2
    assert f"error: {data}:{len(texts) + 1}: not JSON" in err
    assert "Traceback" not in err and out == ""
    assert list(tmp_path.iterdir()) == [data]


def test_full_disk(
    sp_options: list[object], tmp_path: Path, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ["a text of some length"] * 20_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code, _, err = run_here("--input", data, "--output-prefix", tmp_path / "out", *sp_options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert f"cannot write {tmp_path}/out" in err and os.strerror(errno.EFBIG) in err
    assert list(tmp_path.iterdir()) == [data]


def test_existing_dataset_is_left_alone(sp_options: list[object], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ["new"])
    files = {tmp_path / f"out_text_document.{suffix}": suffix.encode() for suffix in ("bin", "idx")}
    for path, content in files.items():
        path.write_bytes(content)
    code, _, err = run("--input", data, "--output-prefix", tmp_path / "out", *sp_options)
    assert code == 2
    assert f"error: {tmp_path}/out_text_document.idx exists already" in err and "delete" in err
    assert {path: path.read_bytes() for path in files} == files
    assert set(tmp_path.iterdir()) == {data, *files}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"--input": "."}, "--input .: no such file"),
        ({"--output-prefix": "absent/out"}, "absent is not a directory"),
        ({"--tokenizer-model": "absent.model"}, "absent.model"),
        ({"--tokenizer-model": __file__}, "cannot load the GPTSentencePieceTokenizer"),
        ({"--tokenizer-type": "NullTokenizer"}, "needs --vocab-size"),
        ({"--workers": 0}, "at least 1"),
        ({"--json-keys": "text text"}, "twice"),
    ],
)
def test_mistakes_on_the_command_line(
    changes: dict[str, object],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "data.jsonl", ["text"])
    options: dict[str, object] = {
        "--input": data,
        "--output-prefix": "out",
        "--tokenizer-type": "GPTSentencePieceTokenizer",
        "--tokenizer-model": model,
    }
    pairs = (options | changes).items()
    code, _, err = run_here(*(word for name, value in pairs for word in f"{name} {value}".split()))
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert list(tmp_path.iterdir()) == [data]


def test_nothing_to_write(
    sp_options: list[object], tmp_path: Path, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ["", ""])
    code, _, err = run_here("--input", data, "--output-prefix", tmp_path / "out", *sp_options)
    assert code == 2 and "every document is empty" in err
    assert list(tmp_path.iterdir()) == [data]


def test_eod_that_does_not_exist(
    texts: list[str], tmp_path: Path, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    prefix = tmp_path / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:200]),
        model_prefix=str(prefix),
        vocab_size=400,
        eos_id=-1,
        minloglevel=2,
    )
    data = write_jsonl(tmp_path / "data.jsonl", ["text"])
    options = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.model"]
    code, _, err = run_here(
        "--input", data, "--output-prefix", tmp_path / "out", *options, "--append-eod"
    )
    assert code == 2 and "no end-of-document token" in err


class Stalled:
    """The tool with two workers, stopped in the middle: it waits for a second input, a pipe."""

    def __init__(self, texts: list[str], sp_options: list[object], directory: Path) -> None:
        self.first = write_jsonl(directory / "first.jsonl", texts * 4)
        pipe = directory / "pipe"
        os.mkfifo(pipe)
        prefix = directory / "out"
        self.process = start(
            *["--input", self.first, pipe, "--output-prefix", prefix, "--workers", 2, *sp_options],
            start_new_session=True,
        )
        self.pipe = wait_for(lambda: open_writer(pipe))
        partial = Path(f"{prefix}_text_document.bin.partial")
        wait_for(lambda: partial.exists() and partial.stat().st_size > 0)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.workers = [int(pid) for pid in children.read_text().split()]
        assert len(self.workers) == 2

    def finish(self) -> tuple[int, str]:
        """Close the pipe and wait for all processes; exit code and stderr."""
        os.close(self.pipe)
        code, _, err = finish(self.process)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.workers))
        return code, err


def open_writer(pipe: Path) -> int | None:
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no reader yet
            raise
        return None


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.02)
    raise TimeoutError


@pytest.fixture
def stalled(texts: list[str], sp_options: list[object], tmp_path: Path) -> Iterator[Stalled]:
    tool = Stalled(texts, sp_options, tmp_path)
    yield tool
    with suppress(ProcessLookupError):
        os.killpg(tool.process.pid, signal.SIGKILL)  # workers that a failed test left, too
    tool.process.wait()


def outputs(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name.startswith("out")}


def test_kill_and_run_again(
    stalled: Stalled,
    pieces: sentencepiece.SentencePieceProcessor,
    sp_options: list[object],
    tmp_path: Path,
) -> None:
    stalled.process.kill()
    code, _ = stalled.finish()  # checks that the workers end, too
    assert code == -signal.SIGKILL
    assert outputs(tmp_path) == {"out_text_document.bin.partial"}

    # As a kill between the two renames leaves it.
    (tmp_path / "out_text_document.bin").write_bytes(b"stale")
    (tmp_path / "out_text_document.idx.partial").write_bytes(b"stale")
    code, _, err = run("--input", stalled.first, "--output-prefix", tmp_path / "out", *sp_options)
    assert code == 0, err
    assert outputs(tmp_path) == {"out_text_document.bin", "out_text_document.idx"}
    lines = stalled.first.read_text(encoding="utf-8").split("\n")[:-1]
    assert read_dataset(tmp_path / "out_text_document") == [
        tuple(pieces.encode(json.loads(line)["text"])) for line in lines
    ]


def test_killed_worker(stalled: Stalled, tmp_path: Path) -> None:
    os.kill(stalled.workers[0], signal.SIGKILL)
    code, err = stalled.finish()
    assert code == 2
    assert "a worker process was killed" in err and "Traceback" not in err
    assert outputs(tmp_path) == set()


def test_interrupt(stalled: Stalled, tmp_path: Path) -> None:
    os.killpg(stalled.process.pid, signal.SIGINT)  # as Ctrl-C: to the workers, too
    code, err = stalled.finish()
    assert code == 130
    assert "Traceback" not in err
    assert outputs(tmp_path) == set()


def test_tokenizer_options_are_megatrons() -> None:
    """Names, defaults and types agree, so that training's options mean the same here."""
    from megatron.core.tokenizers.utils.build_tokenizer import SUPPORTED_TOKENIZERS
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    tool = load_tool()
    assert set(tool.TOKENIZER_TYPES) <= set(SUPPORTED_TOKENIZERS)
    megatron = ArgumentParser()
    ArgumentGroupFactory(TokenizerConfig).build_group(megatron, "tokenizer")
    theirs = {name: action for action in megatron._actions for name in action.option_strings}
    parser = tool.build_parser()
    ours = {name: action for action in parser._actions for name in action.option_strings}
    for name in tool.TOKENIZER_OPTIONS:
        for attribute in ("dest", "default", "nargs", "const"):
            assert getattr(ours[name], attribute) == getattr(theirs[name], attribute), name
        assert (ours[name].type or str) is (theirs[name].type or str), name
