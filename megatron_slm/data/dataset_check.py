"""Check that a dataset can be what its files say, by a few reads whose number is bounded.

The check covers the header, sizes, ends and a few offsets, and the manifest's sizes, type of ids
and tokenizer.  Every rank does it when training starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.indexed_format import Index, open_index, token_dtype
from megatron_slm.data.manifest import manifest_of_pair, manifest_path
from megatron_slm.data.manifest_types import PairManifest
from megatron_slm.errors import UserError
from megatron_slm.files import sha256_of

PROBED = 512  # offsets that are checked
REWRITE = "write the dataset again"

# Kinds of tokenizer files, by Megatron's names of tokenizer types.
TOKENIZER_KINDS = {
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "hugging-face",
}


@dataclass(frozen=True)
class CheckedDataset:
    """A pair of files that has passed the quick check, with its manifest if there is one."""

    prefix: Path
    index: Index
    manifest: PairManifest | None

    @property
    def tokens(self) -> int:
        """Number of tokens, from the size of the .bin."""
        return Path(f"{self.prefix}.bin").stat().st_size // self.index.dtype.itemsize


def check_quickly(
    prefix: str | Path,
    vocab_size: int | None = None,
    manifest: PairManifest | None = None,
    tokenizer_model: str | None = None,
) -> CheckedDataset:
    """Open a dataset and check it quickly.

    Args:
        prefix: path without .bin and .idx.
        vocab_size: vocabulary size of the run that will read it; None not to check it.
        manifest: the dataset's manifest; None for the one beside it, if there is one.
        tokenizer_model: that run's tokenizer file, which is compared if the manifest has the hash
            of a file of its kind.

    Raises:
        UserError: index and data do not belong together, are truncated, or have a wrong type,
            vocabulary or tokenizer; or the dataset was not merged.
    """
    prefix = Path(prefix)
    if manifest is None:
        manifest = manifest_of_pair(prefix)
    index = open_index(Path(f"{prefix}.idx"))
    data = Path(f"{prefix}.bin")
    try:
        size = data.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {data}: {error.strerror}") from error
    if index.dtype.kind not in "iu":
        raise UserError(f"{prefix}.idx says ids are of type {index.dtype}; they are whole numbers")
    _check_ends(prefix, index, size)
    if manifest is not None:
        _check_manifest(prefix, index, manifest, vocab_size, tokenizer_model)
    return CheckedDataset(prefix, index, manifest)


def _check_manifest(
    prefix: Path,
    index: Index,
    manifest: PairManifest,
    vocab_size: int | None,
    tokenizer_model: str | None,
) -> None:
    """Check the manifest against the files and the run, without reading the data."""
    tokenizer = manifest.options.tokenizer
    for suffix, recorded in (("bin", manifest.bin.size), ("idx", manifest.idx.size)):
        path = Path(f"{prefix}.{suffix}")
        actual = path.stat().st_size
        if actual != recorded:
            raise UserError(f"{path} has {actual} bytes, its manifest {recorded}; {REWRITE}")
    made_with, dtype, sequences = tokenizer.vocab_size, index.dtype, 0
    for shard in manifest.shards:
        output = shard.output
        sequences += output.documents
        if output.bin.size != output.tokens * dtype.itemsize:
            raise UserError(
                f"{prefix}: by its manifest {shard.name} has {output.tokens} tokens in "
                f"{output.bin.size} bytes; {REWRITE}"
            )
    if sequences != len(index.lengths):
        raise UserError(
            f"{prefix}.idx has {len(index.lengths)} sequences, its manifest {sequences}; {REWRITE}"
        )
    if dtype != token_dtype(made_with):
        raise UserError(
            f"{prefix}.idx says ids are of type {dtype}, but by its manifest they are "
            f"{token_dtype(made_with)}; {REWRITE}"
        )
    if vocab_size is not None and made_with > vocab_size:
        raise UserError(
            f"{prefix} was made with a tokenizer of {made_with} tokens, this run's has "
            f"{vocab_size}; use the same tokenizer, or write the dataset with this run's"
        )
    file = None if tokenizer_model is None else _same_kind(Path(tokenizer_model), tokenizer.name)
    if file is not None and _tokenizer_hash(file) != tokenizer.sha256:
        of_pair = manifest_path(prefix)
        raise UserError(
            f"{prefix} was made with another tokenizer than this run's {file}: by the manifest in "
            f"{of_pair if of_pair.exists() else prefix.parent} with {tokenizer.name} of SHA-256 "
            f"{tokenizer.sha256}; use the same tokenizer, or write the dataset with this run's"
        )


def _same_kind(model: Path, name: str) -> Path | None:
    """Return a run's tokenizer file if a manifest's of this name is of the same kind, else None.

    Only then do different bytes mean another tokenizer.
    """
    if model.is_dir():
        model /= "tokenizer.json"
    sentencepiece = ".model" in model.name and ".model" in name
    same = sentencepiece or (model.suffix == ".json" and model.name == name)
    return model if same and model.is_file() else None


_tokenizer_hash = cache(sha256_of)  # hashed once for all datasets of a run


def _check_ends(prefix: Path, index: Index, size: int) -> None:
    """Check the ends of the index in a bounded number of reads."""
    count, width = len(index.lengths), index.dtype.itemsize
    if count == 0:
        raise UserError(f"{prefix} has no documents")
    end = int(index.offsets[-1]) + int(index.lengths[-1]) * width
    if end != size:
        raise UserError(
            f"{prefix}.bin has {size} bytes, but by {prefix}.idx it has {end}: it is truncated, or "
            f"the two are not of the same dataset; {REWRITE}"
        )
    ends = index.document_ends
    if not len(ends) or ends[0] != 0 or ends[-1] != count:
        raise UserError(f"{prefix}.idx: its documents do not end with its {count} sequences")
    at = np.unique(np.linspace(0, count - 1, PROBED).astype(np.int64))
    before = np.where(at > 0, index.offsets[at - 1] + index.lengths[at - 1].astype(int) * width, 0)
    refuse_offsets(prefix, at, index.offsets[at], before)


def refuse_offsets(prefix: Path, at: Any, offsets: Any, expected: Any) -> None:
    """Check that sequences begin at the expected bytes.

    Args:
        prefix: the dataset, for errors.
        at: [n], numbers of the sequences.
        offsets: [n], bytes at which they begin.
        expected: [n], bytes at which they should begin.

    Raises:
        UserError: one of them does not.
    """
    wrong = np.flatnonzero(offsets != expected)
    if wrong.size:
        first = wrong[0]
        raise UserError(
            f"{prefix}.idx: sequence {at[first]} begins at byte {offsets[first]}, but the one "
            f"before it ends at {expected[first]}; {REWRITE}"
        )
