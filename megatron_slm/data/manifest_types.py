"""Define the types of the JSON beside datasets, mixes and score caches, and in token dumps.

Reading a file checks it against its type; nothing else looks into its JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

_Count = Annotated[int, Meta(ge=0, le=1 << 62)]
_Path = Annotated[str, Meta(pattern=r"^[^\x00]+$")]


class FileSize(msgspec.Struct, frozen=True):
    """The length of a file in bytes."""

    size: _Count


class FileContent(FileSize, frozen=True):
    """The length of a file and its SHA-256."""

    sha256: str


class ShardOutput(msgspec.Struct, frozen=True):
    """A shard's part of the dataset of one key."""

    documents: _Count
    tokens: _Count
    bin: FileContent
    idx: FileContent


class InputPart(msgspec.Struct, frozen=True):
    """The bytes from `start` to `end` of an input file."""

    path: _Path
    size: _Count
    """Length of the whole file."""
    modified: int
    """Time of its last change in nanoseconds."""
    start: _Count
    end: _Count
    sha256: str
    """Hash of the part."""

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError("a part of its inputs begins behind its end")


class TokenizerIdentity(msgspec.Struct, frozen=True):
    """The tokenizer's file, without its directory."""

    name: str
    sha256: str
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 31)]


class ReadingOptions(msgspec.Struct, frozen=True):
    """The options that decide which texts are read."""

    json_keys: list[str]
    filters: list[tuple[str, str]]
    chat_template: str | None
    """SHA-256 of the template."""
    dedup: Literal["exact", "near"] | None
    words: int | None
    """Version of the rule that splits texts into words, where an option needs words."""


class ShardOptions(ReadingOptions, frozen=True):
    """All options that decide what is in a shard; one made with other options is made again."""

    tokenizer: TokenizerIdentity
    domain: str | None
    append_eod: _Count | None
    """Id of the token."""
    prepend_bos: _Count | None
    """Id of the token."""
    special_tokens_in_text: Literal["text", "ids"]
    decontaminate: str | None
    """SHA-256 of the evaluation sets."""


class DocumentCounts(msgspec.Struct):
    """How many documents were read, what became of them, and how many tokens they have."""

    read: _Count
    documents: _Count
    tokens: _Count
    empty: _Count
    blank_lines: _Count
    filtered: _Count
    rejects: _Count
    exact_duplicates: _Count
    near_duplicates: _Count
    contaminated: _Count


def total_counts(counts: Sequence[DocumentCounts]) -> DocumentCounts:
    """Return the sums, zeros if there is nothing to add up."""
    names = DocumentCounts.__struct_fields__
    return DocumentCounts(*(sum(getattr(each, name) for each in counts) for name in names))


class ShardManifest(msgspec.Struct, frozen=True):
    """A shard, with its part of the dataset of each key, or of that dataset's key alone."""

    name: _Path
    inputs: list[InputPart]
    options: ShardOptions
    engine: str
    engine_version: str
    dropped: str | None
    """SHA-256 of the verdicts on its documents, with --dedup."""
    counts: DocumentCounts
    outputs: Annotated[dict[str, ShardOutput], Meta(min_length=1)]

    def of_key(self, key: str) -> ShardManifest:
        """Return the manifest with the output of one key."""
        return msgspec.structs.replace(self, outputs={key: self.outputs[key]})

    @property
    def output(self) -> ShardOutput:
        """The shard's only output, in the manifest of a dataset."""
        (output,) = self.outputs.values()
        return output


class DatasetCounts(msgspec.Struct, frozen=True):
    """Sizes of a dataset."""

    documents: _Count
    tokens: _Count


class DatasetManifest(msgspec.Struct, frozen=True):
    """The dataset of one key."""

    options: ShardOptions
    merged: bool
    """Whether it is a pair of files, which have sizes then, or a list of its shards' pairs."""
    counts: DatasetCounts
    shards: Annotated[list[ShardManifest], Meta(min_length=1)]
    bin: FileSize | UnsetType = UNSET
    idx: FileContent | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Check that the shards make up the whole."""
        shards = self.shards
        keys = {key for shard in shards for key in shard.outputs}
        if len(keys) > 1 or not all(keys <= set(shard.options.json_keys) for shard in shards):
            raise ValueError(f"its shards are of other keys: {', '.join(sorted(keys))}")
        outputs = [shard.output for shard in shards]
        documents, tokens = (
            sum(getattr(output, name) for output in outputs) for name in ("documents", "tokens")
        )
        if DatasetCounts(documents, tokens) != self.counts or documents == 0:
            raise ValueError(
                f"its counts are {msgspec.to_builtins(self.counts)}, but its shards have "
                f"{documents} documents and {tokens} tokens"
            )
        if not self.merged:
            return
        if self.bin is UNSET or self.idx is UNSET:
            missing = "bin" if self.bin is UNSET else "idx"
            raise ValueError(f"Object missing required field `{missing}`")
        size = sum(output.bin.size for output in outputs)
        if size != self.bin.size:
            raise ValueError(f"its .bin has {self.bin.size} bytes, but its shards have {size}")

    @property
    def pair(self) -> PairManifest | None:
        """What is known of the dataset's pair of files; None if it was not merged."""
        if self.bin is UNSET or self.idx is UNSET or not self.merged:
            return None
        return PairManifest(self.options, self.bin, self.idx, self.shards)


@dataclass(frozen=True)
class PairManifest:
    """What is known of a pair of .bin and .idx: a dataset's, or that of one of its shards."""

    options: ShardOptions
    bin: FileSize
    idx: FileContent
    shards: list[ShardManifest]
    """The shards that it is made of, each with one output."""

    @classmethod
    def of_shard(cls, shard: ShardManifest, key: str) -> PairManifest:
        """Return what is known of a shard's pair of files for a key."""
        output = shard.outputs[key]
        return cls(shard.options, output.bin, output.idx, [shard.of_key(key)])


class DecidedDatasets(msgspec.Struct, frozen=True):
    """Datasets, by key, that are complete but have not replaced the old ones yet."""

    datasets: dict[str, DatasetManifest]


class Fingerprints(msgspec.Struct, frozen=True):
    """A task's documents, among which duplicates are looked for."""

    inputs: list[InputPart]
    options: ReadingOptions
    documents: _Count


class VerdictsManifest(msgspec.Struct, frozen=True):
    """The documents among which duplicates were looked for."""

    fingerprints: list[Fingerprints]


class Reject(msgspec.Struct):
    """A line of a list of rejects: a document that could not be used."""

    file: str
    line: int
    """Counted from 1."""
    reason: str
    content: str = ""


class MixedDataset(msgspec.Struct, frozen=True):
    """A dataset's part of a mix."""

    path: str
    weight: int
    """Tokens to be drawn from it."""
    available: int
    """Tokens that it has."""
    idx_sha256: str
    bin_sha256: list[str] | UnsetType = UNSET
    """Hashes of the parts that its shards made, one after the other."""
    tokenizer_sha256: str | UnsetType = UNSET


class MixedSource(msgspec.Struct, frozen=True):
    """A source's part of a mix."""

    name: str
    domain: str | None
    tokens: int
    epochs: float
    datasets: list[MixedDataset]


class MixManifest(msgspec.Struct, frozen=True):
    """A mix: a budget of tokens, and what is drawn from where."""

    recipe: str
    """SHA-256 of the recipe."""
    budget: int
    sources: list[MixedSource]


class ScoredData(msgspec.Struct, frozen=True):
    """Fingerprints of all that determines the tokens of each record of a score cache.

    Only caches of kind "sample" have those of the samples' order (from `seed` on).
    """

    tokenizer: str
    vocabulary: int
    datasets: dict[str, dict[str, str]]
    inter_document_masking: Literal[True] | UnsetType = UNSET
    """Whether documents did not see each other; unset where they did."""
    seed: int | UnsetType = UNSET
    split: str | UnsetType | None = UNSET
    reset_position_ids: bool | UnsetType = UNSET
    blends: dict[str, tuple[list[str], list[float] | None]] | UnsetType = UNSET


class DumpOrigin(msgspec.Struct, frozen=True):
    """Where the tokens of a dump come from, and how some of them were selected."""

    tokenizer_type: str | None
    tokenizer_model: str | None
    split: str | UnsetType = UNSET
    domains: list[str] | UnsetType | None = UNSET
    """The domain of each sample, where domains are known."""
    score: str | UnsetType | None = UNSET
    scope: str | UnsetType = UNSET
    ratio: float | UnsetType = UNSET
    checkpoint: dict[str, str] | UnsetType = UNSET
    """Fingerprint of the checkpoint, where one was scored."""
