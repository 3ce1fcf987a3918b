"""Open the datasets to score by document, the run's tokenizer, and the cache to write."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from megatron.training.config.training_config import TokenizerConfig
from numpy.typing import NDArray

from megatron_slm.data.dataset_check import TOKENIZER_KINDS, check_quickly
from megatron_slm.data.indexed_format import Index
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import write_shard
from megatron_slm.data.score_manifest import CacheManifest, shard_size
from megatron_slm.data.scored_dataset import check_names, dataset_fingerprint, dataset_name
from megatron_slm.errors import UserError
from megatron_slm.model.tokenizer_fingerprint import tokenizer_fingerprint


@dataclass(frozen=True)
class RunTokenizer:
    """The tokenizer that the datasets were made with, as Megatron opens it for training."""

    fingerprint: str
    vocabulary: int
    eod: int
    model: str | None
    """Path of its file; None if its tokens are mere numbers."""


def open_run_tokenizer(args: Namespace) -> RunTokenizer:
    """Open the tokenizer that --tokenizer-type, --tokenizer-model and --vocab-size name.

    Raises:
        UserError: there is no such tokenizer, or its kind is not one whose text is known.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    null = args.tokenizer_type == "NullTokenizer"
    if (args.vocab_size if null else args.tokenizer_model) is None:
        needed = "--vocab-size" if null else "--tokenizer-model"
        raise UserError(f"--tokenizer-type {args.tokenizer_type} needs {needed}")
    if not null and args.tokenizer_type not in TOKENIZER_KINDS:
        known = ", ".join(["NullTokenizer", *TOKENIZER_KINDS])
        raise UserError(f"--tokenizer-type {args.tokenizer_type} is not among {known}")
    named = {
        name: getattr(args, name) for name in ("tokenizer_type", "tokenizer_model", "vocab_size")
    }
    own = Namespace(**asdict(TokenizerConfig(**named, pad_vocab_size=False)))
    try:
        tokenizer = build_tokenizer(own)
        fingerprint = tokenizer_fingerprint(own, tokenizer)
    except Exception as error:  # each of Megatron's tokenizers raises its own
        raise UserError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model} "
            f"cannot be read: {' '.join(str(error).split())}"
        ) from error
    model = None if null else args.tokenizer_model
    return RunTokenizer(fingerprint, int(tokenizer.vocab_size), int(tokenizer.eod), model)


@dataclass(frozen=True)
class DatasetDocuments:
    """A dataset's documents, whose tokens stand in the .bin one after the other."""

    prefix: Path
    index: Index

    def __len__(self) -> int:
        return len(self.index.lengths)

    @property
    def name(self) -> str:
        return dataset_name(str(self.prefix))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[documents + 1], the position of each document's first token, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.index.lengths, dtype=np.int64)])

    @cached_property
    def stream(self) -> NDArray[Any]:
        """[tokens], all tokens, mapped."""
        return np.memmap(f"{self.prefix}.bin", mode="r", dtype=self.index.dtype)

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    def ids(self, number: int) -> NDArray[np.int64]:
        """Return the token ids of a document."""
        return self.stream[self.starts[number] : self.starts[number + 1]].astype(np.int64)

    def overlapping(self, start: int, stop: int) -> range:
        """Return the numbers of the documents that have tokens among those from start to stop."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        return range(first, int(np.searchsorted(self.starts, stop, side="left")))


def open_documents(prefixes: Sequence[str], tokenizer: RunTokenizer) -> list[DatasetDocuments]:
    """Open datasets, and check that they are whole and of the run's tokenizer.

    Raises:
        UserError: one is not, or two have the same name.
    """
    check_names(prefixes)
    found = []
    for prefix in prefixes:
        checked = check_quickly(prefix, tokenizer.vocabulary, tokenizer_model=tokenizer.model)
        documents = DatasetDocuments(checked.prefix, checked.index)
        offsets = checked.index.offsets
        if not np.array_equal(offsets, documents.starts[:-1] * checked.index.dtype.itemsize):
            raise UserError(
                f"{prefix}.idx does not list the .bin's documents in order and without gaps"
            )
        found.append(documents)
    return found


def begin_cache(
    args: Namespace,
    datasets: Sequence[DatasetDocuments],
    tokenizer: RunTokenizer,
    reference: dict[str, str],
    **changes: Any,
) -> CacheManifest:
    """Write the manifest of a cache by document, or check that the one there is the same.

    Args:
        args: the command line.
        datasets: what is scored.
        tokenizer: the run's tokenizer.
        reference: what tells the values' origin from any other.
        changes: of the manifest's fields.

    Raises:
        UserError: the arguments make no cache, or the directory holds another one.
    """
    sections = {each.name: -(-each.tokens // args.seq_length) for each in datasets if each.tokens}
    if not sections:
        raise UserError("there is nothing to score: the datasets have no tokens")
    source = ScoredData(
        tokenizer.fingerprint,
        tokenizer.vocabulary,
        {each.name: dataset_fingerprint(str(each.prefix)) for each in datasets},
    )
    what = {
        "kind": "document",
        "dtype": args.cache_dtype,
        "sequence_length": args.seq_length,
        "shard_records": args.shard_samples or shard_size(sections, args.seq_length),
        "sections": sections,
        "source": source,
        "reference": reference,
        **changes,
    }
    try:
        manifest = msgspec.convert(what, CacheManifest)
    except msgspec.ValidationError as error:
        raise UserError(f"no score cache can be made with these arguments: {error}") from error
    manifest.write(Path(args.slm_reference_cache))
    return manifest


def shard_span(manifest: CacheManifest, section: str, shard: int, tokens: int) -> tuple[int, int]:
    """Return the positions in a dataset of `tokens` tokens at which a shard begins and ends."""
    numbers = manifest.records_of(section, shard)
    length = manifest.sequence_length
    return numbers.start * length, min(numbers.stop * length, tokens)


def write_values(
    directory: Path,
    manifest: CacheManifest,
    documents: DatasetDocuments,
    shard: int,
    values: NDArray[np.float32],
    eod: int,
) -> None:
    """Write a shard of a dataset's values.

    What is behind the dataset's last token is filled with end-of-document tokens of value 0.

    Args:
        directory: the cache.
        manifest: its manifest.
        documents: the dataset.
        shard: number of the shard.
        values: those of the shard's tokens, one after the other.
        eod: id of the end-of-document token.
    """
    start, stop = shard_span(manifest, documents.name, shard, documents.tokens)
    shape = (len(manifest.records_of(documents.name, shard)), manifest.sequence_length)
    rows, labels = np.zeros(shape, np.float32), np.full(shape, eod, np.int32)
    rows.reshape(-1)[: stop - start] = values
    labels.reshape(-1)[: stop - start] = documents.stream[start:stop]
    domains = np.zeros(len(rows), np.int64)
    write_shard(directory, manifest, documents.name, shard, rows, labels, domains)


def missing_of(
    there: Sequence[tuple[str, int]], datasets: Sequence[DatasetDocuments]
) -> Iterator[tuple[DatasetDocuments, int]]:
    """Yield the missing shards, given by section and number, each with its dataset."""
    named = {each.name: each for each in datasets}
    for section, shard in there:
        yield named[section], shard
