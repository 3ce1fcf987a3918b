"""Turn jsonl files into Megatron indexed datasets: token ids in .bin, document lengths in .idx.

The parent reads batches of lines, encodes them itself or has forked workers do so, and writes them
in input order, so the files do not depend on the number of workers.  Two batches per worker are
under way at a time.  A bad line comes back as a message, never as a worker's exception.
Files are written under temporary names and renamed when complete, .idx last; nothing reads a
dataset without its .idx, so a run killed at any moment leaves none that looks good.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.errors import UserError

# Small enough for early errors, large enough that passing a batch costs little beside encoding it.
BATCH_BYTES = 1 << 18
BATCH_LINES = 1000


@dataclass(frozen=True)
class PreprocessSettings:
    """tokenizer: what Megatron's build_tokenizer() reads.  log_interval: documents."""

    inputs: tuple[Path, ...]
    output_prefix: str
    tokenizer: Namespace
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    log_interval: int = 1000

    def __post_init__(self) -> None:
        if self.workers < 1 or self.log_interval < 1:
            raise UserError("--workers and --log-interval must be at least 1")
        if len(set(self.json_keys)) < len(self.json_keys):
            raise UserError("--json-keys names a key twice; each key makes one dataset")
        for path in self.inputs:
            if path.is_dir() or not os.access(path, os.R_OK):
                raise UserError(f"--input {path}: no such file, or it cannot be read")


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of one file; first_line counts from 1."""

    path: Path
    first_line: int
    lines: list[bytes]


@dataclass
class EncodedBatch:
    """token_ids[key]: an array for each document that is not empty.  error: FILE:LINE: what."""

    token_ids: dict[str, list[np.ndarray]]
    size: int  # bytes
    documents: int = 0
    blank_lines: int = 0
    error: str | None = None


class BadLine(Exception):
    """What is wrong with a line."""


@dataclass(frozen=True)
class Encoder:
    """Lines to token ids.  eod is appended to each document, unless None."""

    tokenizer: Any
    keys: tuple[str, ...]
    vocab_size: int
    dtype: type[np.number]
    eod: int | None

    def encode(self, batch: Batch) -> EncodedBatch:
        """Encode up to the first bad line, if any, which the result then names."""
        encoded = EncodedBatch({key: [] for key in self.keys}, sum(map(len, batch.lines)))
        for number, line in enumerate(batch.lines, batch.first_line):
            if not line.strip():
                encoded.blank_lines += 1
                continue
            try:
                documents = [self._token_ids(text) for text in self._texts(line)]
            except BadLine as error:
                encoded.error = f"{batch.path}:{number}: {error}"
                break
            encoded.documents += 1
            for key, token_ids in zip(self.keys, documents, strict=True):
                if token_ids.size:
                    encoded.token_ids[key].append(token_ids)
        return encoded

    def _texts(self, line: bytes) -> list[str]:
        try:
            record = json.loads(line.rstrip(b"\r\n").decode())
        except UnicodeDecodeError as error:
            raise BadLine(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
        except json.JSONDecodeError as error:
            raise BadLine(f"not JSON: {error.msg}: character {error.pos + 1}") from error
        except (ValueError, RecursionError) as error:  # thousands of digits or brackets
            raise BadLine(f"JSON that cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise BadLine(f"not a JSON object but a {type(record).__name__}")
        for key in self.keys:
            if key not in record:
                raise BadLine(f"no key {key!r} among {list(record)[:8]}; see --json-keys")
            if not isinstance(record[key], str):
                raise BadLine(f"{key!r} is not a string but a {type(record[key]).__name__}")
        return [record[key] for key in self.keys]

    def _token_ids(self, text: str) -> np.ndarray:
        try:
            text.encode()  # JSON can escape half a surrogate pair, which no tokenizer takes
            ids = list(self.tokenizer.tokenize(text)) if text else []
        except Exception as error:  # whatever it is, the line's number must not be lost
            raise BadLine(f"cannot be tokenized: {type(error).__name__}: {error}") from error
        if ids and self.eod is not None:
            ids.append(self.eod)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise BadLine(
                f"token ids {min(ids)} to {max(ids)} are not all in the vocabulary of "
                f"{self.vocab_size} tokens"
            )
        return np.asarray(ids, dtype=self.dtype)


@dataclass
class DatasetFiles:
    """One key's PREFIX_KEY_document.bin and .idx, and how much has been written to them."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    builder: Any = field(default=None, repr=False)

    def path(self, suffix: str) -> Path:
        return Path(self.prefix + suffix)

    def check_absent(self) -> None:
        """Refuse to replace a dataset.  A .bin alone is none: a killed run left it."""
        path = self.path(".idx")
        if path.exists():
            raise UserError(
                f"{path} exists already: delete it and its .bin, or choose another --output-prefix"
            )
        if not path.parent.is_dir():
            raise UserError(f"--output-prefix: {path.parent} is not a directory")

    def add(self, documents: Iterable[np.ndarray]) -> None:
        for token_ids in documents:
            self.builder.add_document(token_ids, [token_ids.size])
            self.documents += 1
            self.tokens += token_ids.size

    def complete(self) -> None:
        """Write the index, and both files to the disk, still under their temporary names."""
        if self.documents == 0:
            raise UserError(f"no text to write to {self.path('.bin')}: every document is empty")
        self.builder.finalize(str(self.path(".idx.partial")))
        for suffix in (".bin.partial", ".idx.partial"):
            with self.path(suffix).open("rb") as stream:
                os.fsync(stream.fileno())

    def discard(self) -> None:
        """Remove what was not renamed, in silence, so as not to hide the fault that led here."""
        with suppress(OSError):
            if self.builder is not None:
                self.builder.data_file.close()
        for suffix in (".bin.partial", ".idx.partial"):
            with suppress(OSError):
                self.path(suffix).unlink()


@dataclass(frozen=True)
class Summary:
    """documents: how many were read, with empty ones.  seconds: without loading the tokenizer."""

    datasets: list[DatasetFiles]
    documents: int
    blank_lines: int
    seconds: float


def preprocess(settings: PreprocessSettings) -> Summary:
    """Write one indexed dataset per key with the documents of all inputs, in order.

    Raises:
        UserError: a bad line, an unusable tokenizer, a dataset that exists, cannot be written or
            would be empty, or a worker that was killed.  No new dataset is left then.
    """
    prefix = settings.output_prefix
    datasets = [DatasetFiles(f"{prefix}_{key}_document") for key in settings.json_keys]
    for dataset in datasets:
        dataset.check_absent()
    encoder = build_encoder(settings)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    start = time.perf_counter()
    try:
        for dataset in datasets:
            path = str(dataset.path(".bin.partial"))
            dataset.builder = IndexedDatasetBuilder(path, dtype=encoder.dtype)
        documents, blank_lines = _write_documents(settings, encoder, datasets, start)
        for dataset in datasets:
            dataset.complete()
        for suffix in (".bin", ".idx"):
            for dataset in datasets:
                dataset.path(f"{suffix}.partial").replace(dataset.path(suffix))
    except OSError as error:
        raise UserError(f"cannot write {prefix}_*_document.bin and .idx: {error}") from error
    finally:
        for dataset in datasets:
            dataset.discard()
    return Summary(datasets, documents, blank_lines, time.perf_counter() - start)


def build_encoder(settings: PreprocessSettings) -> Encoder:
    """Load the tokenizer as training does.

    Raises:
        UserError: it cannot be loaded, or has no end-of-document token to append.
    """
    args = settings.tokenizer
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise UserError("--tokenizer-type NullTokenizer needs --vocab-size")
    # Imported here, for it takes seconds.  It warns of accelerator libraries, of no use here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.datasets.indexed_dataset import DType
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    try:
        tokenizer = build_tokenizer(args)
        vocab_size = int(tokenizer.vocab_size)
        eod = tokenizer.eod if settings.append_eod else None
    except Exception as error:  # every tokenizer library has its own
        raise UserError(
            f"cannot load the {args.tokenizer_type} from --tokenizer-model {args.tokenizer_model}: "
            f"{error or type(error).__name__}"
        ) from error
    if settings.append_eod and (eod is None or not 0 <= eod < vocab_size):
        raise UserError("--append-eod: the tokenizer has no end-of-document token")
    dtype = DType.optimal_dtype(vocab_size)
    return Encoder(tokenizer, settings.json_keys, vocab_size, dtype, eod)


def _write_documents(
    settings: PreprocessSettings, encoder: Encoder, datasets: list[DatasetFiles], start: float
) -> tuple[int, int]:
    """Encode and write all inputs; returns how many documents and blank lines were read."""
    documents = blank_lines = size = 0
    batches = encode_in_order(encoder, read_batches(settings.inputs), settings.workers)
    with closing(batches):
        for batch in batches:
            if batch.error is not None:
                raise UserError(batch.error)
            for key, dataset in zip(settings.json_keys, datasets, strict=True):
                dataset.add(batch.token_ids[key])
            logged = documents // settings.log_interval
            documents += batch.documents
            blank_lines += batch.blank_lines
            size += batch.size
            if documents // settings.log_interval > logged:
                seconds = time.perf_counter() - start
                rates = f"{documents / seconds:.1f} docs/s, {size / seconds / 1e6:.2f} MB/s"
                print(f"processed {documents} documents ({rates})", file=sys.stderr, flush=True)
    return documents, blank_lines


def read_batches(inputs: Iterable[Path]) -> Iterator[Batch]:
    """The lines of the files in order, in batches that never span two files."""
    for path in inputs:
        first, size, lines = 1, 0, list[bytes]()
        try:
            with path.open("rb") as stream:
                for line in stream:
                    lines.append(line)
                    size += len(line)
                    if size >= BATCH_BYTES or len(lines) >= BATCH_LINES:
                        yield Batch(path, first, lines)
                        first, size, lines = first + len(lines), 0, []
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if lines:
            yield Batch(path, first, lines)


def encode_in_order(
    encoder: Encoder, batches: Iterable[Batch], workers: int
) -> Generator[EncodedBatch, None, None]:
    """Encode batches, in forked processes if workers > 1, which inherit the loaded tokenizer.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 1:
        yield from map(encoder.encode, batches)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, fork, _start_worker, (encoder,))
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run again, with fewer "
            "--workers if so"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that was killed cannot stop its workers; they would wait for batches for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    return _worker_encoder.encode(batch)
