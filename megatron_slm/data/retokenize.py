"""Whether a dataset has the ids of the texts that its manifest says it was made from: the beginning
of some shards' inputs is tokenized again, by the tokenizer's own library."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.data.chat import chat_renderer
from megatron_slm.data.documents import Wanted, read_documents
from megatron_slm.data.engines import ENGINES, Encode, load_engine
from megatron_slm.data.inputs import open_piece
from megatron_slm.data.lines import InputHash
from megatron_slm.data.shard import surround
from megatron_slm.data.tokenizer import open_tokenizer
from megatron_slm.data.verify import Dataset
from megatron_slm.errors import UserError

DOCUMENTS = 64  # of a shard


def check_deeply(
    dataset: Dataset, tokenizer_model: str, chat_template: str | None, shards: int
) -> int:
    """Compare documents of up to `shards` shards; returns how many.

    Raises:
        UserError: other ids, another tokenizer, no manifest, or inputs that are gone.
    """
    manifest = dataset.manifest
    if manifest is None:
        raise UserError(f"{dataset.prefix} has no manifest, so its texts are not known")
    options = manifest["options"]
    file = open_tokenizer(tokenizer_model)
    if file.sha256 != options["tokenizer"]["sha256"]:
        raise UserError(f"{dataset.prefix} was not made with {tokenizer_model}, but another file")
    special = options["special_tokens_in_text"] == "ids"
    encode = load_engine(list(ENGINES[file.kind])[-1], file, special)
    firsts = np.cumsum([0, *(_documents(shard) for shard in manifest["shards"])]).tolist()
    chosen = random.Random(0).sample(range(len(firsts) - 1), min(shards, len(firsts) - 1))
    return sum(
        _check_shard(dataset, manifest["shards"][at], firsts[at], chat_template, encode)
        for at in sorted(chosen)
    )


def _documents(shard: dict[str, Any]) -> int:
    (output,) = shard["outputs"].values()
    return int(output["documents"])


def _check_shard(
    dataset: Dataset,
    shard: dict[str, Any],
    first: int,
    chat_template: str | None,
    encode: Encode,
) -> int:
    """The shard's documents have to be the texts' in their order; those that are duplicates or
    contaminated may be missing."""
    options = shard["options"]
    gaps = options["dedup"] is not None or options["decontaminate"] is not None
    sources = _sources(shard, chat_template, encode)
    data = np.memmap(f"{dataset.prefix}.bin", mode="r", dtype=dataset.index.dtype)
    count = min(DOCUMENTS, _documents(shard))
    for document in range(first, first + count):
        start = int(dataset.index.offsets[document]) // dataset.index.dtype.itemsize
        ids = data[start : start + int(dataset.index.lengths[document])]
        for where, expected in sources:
            if np.array_equal(ids, expected):
                break
            if not gaps:
                raise UserError(
                    f"{dataset.prefix}: document {document} has other ids than the text in {where}"
                )
        else:
            raise UserError(f"{dataset.prefix}: document {document} is not in {shard['name']}")
    return count


def _sources(
    shard: dict[str, Any], chat_template: str | None, encode: Encode
) -> Iterator[tuple[str, Any]]:
    """The ids of a shard's texts, and where they are from."""
    options = shard["options"]
    render = None if chat_template is None else chat_renderer(chat_template)
    (key,) = shard["outputs"]
    keys = tuple(options["json_keys"])
    wanted = Wanted(keys, tuple(map(tuple, options["filters"])), render)
    before, after = (
        () if options[name] is None else (options[name],) for name in ("prepend_bos", "append_eod")
    )
    for recorded in shard["inputs"]:
        piece = open_piece(recorded["path"], recorded["start"], recorded["end"])
        for batch in read_documents(piece, wanted, InputHash(lambda _: None)):
            for texts in batch.texts:
                text = texts[keys.index(key)]
                ids, lengths = encode([text])
                if ids.size:
                    where = f"{Path(piece.path)}: {text[:40]!r}"
                    yield where, surround(ids, lengths, before, after)
