"""What manifests hold, by which they are checked when they are read (manifest.py)."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

_Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Path = Annotated[str, Meta(pattern=r"^[^\x00]+$")]


class FileSize(TypedDict):
    """Of a file, in bytes."""

    size: _Count


class Content(FileSize):
    """Size and SHA-256 of a file."""

    sha256: str


class Output(TypedDict):
    """What a shard is in the dataset of a key."""

    documents: _Count
    tokens: _Count
    bin: Content
    idx: Content


class InputPart(TypedDict):
    """Bytes start to end of an input file of `size` bytes; modified: in nanoseconds."""

    path: Path
    size: _Count
    modified: int
    start: _Count
    end: _Count
    sha256: str


class Tokenizer(TypedDict):
    """The tokenizer's file, without its directory."""

    name: str
    sha256: str
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 31)]


class ReadingOptions(TypedDict):
    """Options that decide which texts are read."""

    json_keys: list[str]
    filters: list[tuple[str, str]]
    chat_template: str | None
    dedup: Literal["exact", "near"] | None
    words: int | None


class Options(ReadingOptions):
    """Options of the command line, as ids and hashes.  A shard with other ones is made again."""

    tokenizer: Tokenizer
    domain: str | None
    append_eod: _Count | None
    prepend_bos: _Count | None
    special_tokens_in_text: Literal["text", "ids"]
    decontaminate: str | None


class Counts(TypedDict):
    """What became of a task's documents."""

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


class ShardManifest(TypedDict):
    """A shard, with its part of the dataset of each key."""

    name: Path
    inputs: list[InputPart]
    options: Options
    engine: str
    engine_version: str
    dropped: str | None
    counts: Counts
    outputs: Annotated[dict[str, Output], Meta(min_length=1)]


class Totals(TypedDict):
    """Of a dataset."""

    documents: _Count
    tokens: _Count


class DatasetManifest(TypedDict):
    """The dataset of one key.  bin, idx: if its shards are merged."""

    options: Options
    merged: bool
    counts: Totals
    shards: Annotated[list[ShardManifest], Meta(min_length=1)]
    bin: NotRequired[FileSize]
    idx: NotRequired[Content]


class Decided(TypedDict):
    """Datasets that are whole, by key, and not yet in the place of the old ones."""

    datasets: dict[str, DatasetManifest]


class Fingerprints(TypedDict):
    """A task's documents, among which duplicates are looked for."""

    inputs: list[InputPart]
    options: ReadingOptions
    documents: _Count


class VerdictsManifest(TypedDict):
    """What the duplicates were found among."""

    fingerprints: list[Fingerprints]


class Reject(TypedDict):
    """A line of a list of rejects."""

    file: str
    line: int
    reason: str
