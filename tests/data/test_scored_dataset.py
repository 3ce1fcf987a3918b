"""Samples carry the losses of their own labels, and windows hold every token once."""

from __future__ import annotations

import json
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from gpt_datasets import gpt_config
from megatron_slm.data import score_cache
from megatron_slm.data.indexed_format import write_index
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import Section, write_shard
from megatron_slm.data.score_manifest import CacheManifest, read_cache_manifest
from megatron_slm.data.scored_dataset import (
    DocumentWindows,
    SampleScored,
    _Positions,
    dataset_fingerprint,
    document_scored,
)
from megatron_slm.errors import UserError

TOKENS, EOD = 5000, 60000
SCORED_LENGTH, LENGTH = 48, 32
DATASETS: dict[str, dict[str, str]] = {"positions": {}, "web": {}, "code": {}}
SOURCE = ScoredData("t", EOD + 1, DATASETS, blends={})


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of many lengths whose tokens are their own positions in the file."""
    prefix = str(tmp_path_factory.mktemp("positions") / "positions")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    lengths = np.random.default_rng(1).integers(1, 200, 100)
    start = 0
    for length in [*lengths, TOKENS]:
        tokens = np.arange(start, min(start + length, TOKENS))
        if len(tokens):
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        start += length
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_cache(directory: Path, kind: Any, name: str, records: int, rows: np.ndarray) -> Section:
    """Loss of a label: a thousandth of its id."""
    manifest = CacheManifest(kind, "float32", rows.shape[1], 7, {name: records}, SOURCE, {})
    manifest.write(directory)
    for shard in range(manifest.shards(name)):
        part = rows[manifest.records_of(name, shard)]
        losses = (part / 1000).astype(np.float32)
        write_shard(directory, manifest, name, shard, losses, part, np.zeros(len(part), np.int64))
    return Section(directory, manifest, name)


def build(prefix: str, kind: Any = GPTDataset, count: int = 400, apart: bool = False) -> Any:
    """Training samples in Megatron's order, of more than one epoch."""
    kinds = {"eod_mask_loss": True, "inter_document_masking": apart}
    config = gpt_config(LENGTH, EOD + 1, random_seed=5, blend=([prefix], None), **kinds)
    builder = BlendedMegatronDatasetBuilder(kind, [count, 0, 0], lambda: True, config)
    return builder.build()[0]


def test_windows_hold_every_token_once(prefix: str) -> None:
    windows = DocumentWindows(IndexedDataset(prefix), SCORED_LENGTH, EOD)
    samples = [windows[index] for index in range(len(windows))]
    labels = torch.cat([sample["labels"] for sample in samples])
    assert labels[:TOKENS].tolist() == list(range(TOKENS))
    assert (labels[TOKENS:] == EOD).all() and len(labels) - TOKENS < SCORED_LENGTH
    tokens = torch.cat([sample["tokens"] for sample in samples])
    assert tokens[0] == EOD and torch.equal(tokens[1:], labels[:-1])


@pytest.mark.parametrize("length", [16, SCORED_LENGTH, 250])
def test_windows_of_documents_that_do_not_see_each_other(prefix: str, length: int) -> None:
    """Every token is a label once; a document that fits is whole in one window, and begins anew."""
    dataset = IndexedDataset(prefix)
    windows = DocumentWindows(dataset, length, EOD, apart=True)
    ends = np.cumsum(dataset.index.sequence_lengths).tolist()
    pieces: list[list[int]] = []  # of labels, by the document that their inputs are in
    for index in range(len(windows)):
        sample = windows[index]
        cuts = sample["cu_seqlens"].tolist()
        assert len(cuts) == length + 1 and cuts[0] == 0 and cuts[-1] == length
        for start, stop in pairwise(sorted(set(cuts))):
            labels = sample["labels"][start:stop].tolist()
            assert sample["position_ids"][start:stop].tolist() == list(range(stop - start))
            if labels[0] == EOD:
                assert set(labels) == {EOD}  # what is missing
                continue
            assert sample["tokens"][start].item() == (labels[0] or EOD + 1) - 1
            assert sample["tokens"][start + 1 : stop].tolist() == labels[:-1]
            pieces.append(labels)
    assert [label for piece in pieces for label in piece] == list(range(TOKENS))
    # The first label has an input of its own; that of a document's first token is one before it.
    for first, end in pairwise([0, *ends]):
        if first < end < TOKENS and end - first <= length:
            assert list(range(first + 1, end + 1)) in pieces


def test_losses_by_document_of_documents_that_do_not_see_each_other(
    prefix: str, tmp_path: Path
) -> None:
    """Each label's own, and those of a document that fits come from a window that has it whole."""
    windows = DocumentWindows(IndexedDataset(prefix), SCORED_LENGTH, EOD, apart=True)
    rows = np.stack([windows[index]["labels"].numpy() for index in range(len(windows))])
    section = write_cache(tmp_path, "document", "positions", len(rows), rows.astype(np.int32))
    scored = build(prefix, document_scored({"positions": section}), apart=True)
    for index in range(0, len(scored), 3):
        sample = scored[index]
        assert "cu_seqlens" in sample
        torch.testing.assert_close(
            sample["reference_losses"], sample["labels"] / 1000, rtol=0.0, atol=1e-6
        )


def test_losses_by_document_are_those_of_the_labels(prefix: str, tmp_path: Path) -> None:
    """Scored in windows of another length than the run's."""
    windows = DocumentWindows(IndexedDataset(prefix), SCORED_LENGTH, EOD)
    rows = np.stack([windows[index]["labels"].numpy() for index in range(len(windows))])
    section = write_cache(tmp_path, "document", "positions", len(rows), rows.astype(np.int32))
    scored = build(prefix, document_scored({"positions": section}))
    plain = build(prefix)
    assert len(scored) == len(plain) > TOKENS // LENGTH
    for index in range(0, len(scored), 3):
        sample = scored[index]
        assert torch.equal(sample["labels"], plain[index]["labels"])
        torch.testing.assert_close(
            sample["reference_losses"], sample["labels"] / 1000, rtol=0.0, atol=1e-6
        )


def test_positions_that_int32_does_not_hold(tmp_path: Path) -> None:
    """Megatron's lengths, and those it asks for, are int32."""
    lengths = np.array([2**31 - 1, 4], np.int32)
    write_index(tmp_path / "large.idx", np.dtype(np.uint16), 2, lambda: iter([lengths]))
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))  # of which none is on the disk
    positions = _Positions(IndexedDataset(str(tmp_path / "large")))
    assert positions.get(1, offset=1).tolist() == [2**31, 2**31 + 1, 2**31 + 2]
    assert positions.get(1, 0, np.int32(2)).tolist() == [2**31 - 1, 2**31]


def test_losses_by_sample(prefix: str, tmp_path: Path) -> None:
    plain = build(prefix)
    rows = np.stack([plain[index]["labels"].numpy() for index in range(50)]).astype(np.int32)
    section = write_cache(tmp_path, "sample", "train", len(rows), rows)
    scored = SampleScored(plain, section)
    assert len(scored) == len(plain) and scored.index_split == plain.index_split
    for index in range(50):
        sample = scored[index]
        torch.testing.assert_close(
            sample["reference_losses"], sample["labels"] / 1000, rtol=0.0, atol=1e-6
        )
    assert not scored[None]["reference_losses"].any()
    with pytest.raises(UserError, match="sample 50 of train is not in the score cache"):
        scored[50]
    # Other samples under the same numbers.
    other = write_cache(tmp_path / "other", "sample", "train", len(rows), rows[::-1])
    with pytest.raises(UserError, match="has other tokens than those scored"):
        SampleScored(plain, other)[3]


def test_damage_is_named(prefix: str, tmp_path: Path) -> None:
    rows = np.arange(20 * LENGTH, dtype=np.int32).reshape(20, LENGTH)
    section = write_cache(tmp_path, "sample", "train", 20, rows)
    path = tmp_path / "train" / "00001.losses"
    content = bytearray(path.read_bytes())
    content[section.manifest.record.itemsize * 2 + 5] ^= 1
    path.write_bytes(content)
    section.losses(8, rows[8])
    with pytest.raises(UserError, match=r"00001.losses is damaged at record 2 \(sample 9\)"):
        section.losses(9, rows[9])
    path.unlink()
    path.write_bytes(content[:-1])
    score_cache._open_shard.cache_clear()  # as in a process that has not read it yet
    with pytest.raises(UserError, match=r"00001\.losses is damaged: it has"):
        section.losses(8, rows[8])
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.losses is missing: finish the cache"):
        Section(tmp_path, section.manifest, "train")


def read_all(section: Section) -> list[str]:
    """Read every record, and return what is said about each."""
    score_cache._open_shard.cache_clear()  # as in a process that has not read it yet
    found = []
    for number in range(len(section)):
        try:
            section.losses(number, None)
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("kind", ["sample", "document"])
def test_a_record_holds_in_its_place_alone(kind: str, tmp_path: Path) -> None:
    """Not in another shard, section or record, nor under another manifest, nor of other domains."""
    rows = np.arange(14 * 5, dtype=np.int32).reshape(14, 5)
    section = write_cache(tmp_path / "cache", kind, "web", 14, rows)
    other = write_cache(tmp_path / "other", kind, "code", 14, rows)
    assert not any(read_all(section))
    files = [tmp_path / "cache" / "web" / f"0000{at}.losses" for at in range(2)]
    whole = [file.read_bytes() for file in files]
    (theirs,) = (tmp_path / "other" / "code").glob("00000.losses")
    size = len(whole[0]) // 7
    in_reverse = b"".join(whole[0][at * size : (at + 1) * size] for at in reversed(range(7)))
    other_domain = bytearray(whole[0])
    other_domain[size - 12] ^= 1
    for first, second, wrong in (
        (whole[1], whole[0], set(range(14))),
        (theirs.read_bytes(), whole[1], set(range(7))),
        (in_reverse, whole[1], {0, 1, 2, 4, 5, 6}),  # but for the one in the middle
        (bytes(other_domain), whole[1], {0}),
    ):
        files[0].write_bytes(first)
        files[1].write_bytes(second)
        found = read_all(section)
        assert {at for at, said in enumerate(found) if said} == wrong
        assert all("or is another shard: delete it and run" in found[at] for at in wrong)
    assert not any(read_all(other))


@pytest.mark.parametrize("loss", [np.inf, -np.inf, np.nan, -5.0])
def test_losses_that_no_model_has(
    loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither written nor, from another writer, read."""
    rows = np.arange(14 * 5, dtype=np.int32).reshape(14, 5)
    manifest = CacheManifest("document", "float32", 5, 7, {"web": 7}, SOURCE, {})
    manifest.write(tmp_path)
    losses = np.ones((7, 5), np.float32)
    losses[3, 2] = loss
    losses[2, 2] = -1e-7  # by rounding
    part = (losses, rows[:7], np.zeros(7, np.int64))
    with pytest.raises(UserError, match="loss of sample 3 of web is not a finite number from 0 on"):
        write_shard(tmp_path, manifest, "web", 0, *part)
    with monkeypatch.context() as patched:
        patched.setattr(score_cache, "_possible", lambda losses: np.ones(losses.shape, bool))
        write_shard(tmp_path, manifest, "web", 0, *part)
    said = read_all(Section(tmp_path, manifest, "web"))
    assert [at for at, each in enumerate(said) if each] == [3]
    assert "00000.losses has a loss that is not a finite number from 0 on in record 3" in said[3]


def test_a_shard_that_goes_while_it_is_read(tmp_path: Path) -> None:
    """Cut, it is no bus error; deleted, it can be read to the end of the process, or is missing."""
    rows = np.arange(14 * 5, dtype=np.int32).reshape(14, 5)
    section = write_cache(tmp_path, "document", "web", 14, rows)
    assert not any(read_all(section))
    files = [tmp_path / "web" / f"0000{at}.losses" for at in range(2)]
    with files[0].open("r+b") as file:
        file.truncate(100)
    files[1].unlink()
    section.losses(0, None)
    with pytest.raises(UserError, match=r"00000.losses is damaged at record 6 \(sample 6\)"):
        section.losses(6, None)
    section.losses(13, None)
    said = read_all(section)
    assert "00000.losses is damaged: it has 100 bytes, not" in said[0]
    assert "00001.losses is missing: finish the cache with the command that began it" in said[13]


def test_two_jobs_begin_a_cache(tmp_path: Path) -> None:
    """The same goes on; another is told."""
    one, same, other = (
        CacheManifest("sample", "uint16", length, 2, {"train": 3}, SOURCE, {})
        for length in (4, 4, 8)
    )
    one.write(tmp_path)
    same.write(tmp_path)
    with pytest.raises(UserError, match="sequence_length is 8 here, 4 there"):
        other.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_cache_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Written here as that version wrote it; a job does not continue it."""
    about = {"dtype": "uint16", "sequence_length": 4, "shard_records": 2, "sections": {"train": 3}}
    about |= {"format": 1, "kind": "sample", "source": msgspec.to_builtins(SOURCE), "reference": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    (tmp_path / "train").mkdir()
    labels = np.arange(12, dtype=np.int32).reshape(3, 4)
    records = [
        struct.pack("<4H3I", *stored, 0, zlib.crc32(row.tobytes()), zlib.crc32(stored.tobytes()))
        for row in labels
        for stored in [(700 * row).astype("<u2")]
    ]
    (tmp_path / "train/00000.losses").write_bytes(records[0] + records[1])
    (tmp_path / "train/00001.losses").write_bytes(records[2][:-1] + b"?")
    manifest = read_cache_manifest(tmp_path)
    section = Section(tmp_path, manifest, "train")
    assert np.array_equal(section.losses(1, labels[1]), np.float32((labels[1] * 700 / 8192) ** 2))
    with pytest.raises(UserError, match=r"damaged at record 0 \(sample 2\)"):
        section.losses(2, labels[2])
    with pytest.raises(UserError, match="begun by an older version, whose format 1 is read"):
        CacheManifest("sample", "uint16", 4, 2, {"train": 3}, SOURCE, {}).write(tmp_path)


def test_a_loss_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    manifest = CacheManifest("sample", "uint16", 4, 2, {"train": 3}, SOURCE, {})
    manifest.write(tmp_path)
    losses = np.ones((2, 4), np.float32)
    losses[1, 2] = np.nan
    with pytest.raises(UserError, match="loss of sample 1 of train is not a finite number"):
        write_shard(
            tmp_path, manifest, "train", 0, losses, np.ones((2, 4), np.int32), np.zeros(2, np.int64)
        )
    assert not list(tmp_path.rglob("*.losses"))


def test_fingerprint_sees_changes(prefix: str, tmp_path: Path) -> None:
    copy = tmp_path / "positions"
    for kind in ("bin", "idx"):
        Path(f"{copy}.{kind}").write_bytes(Path(f"{prefix}.{kind}").read_bytes())
    assert dataset_fingerprint(str(copy)) == dataset_fingerprint(prefix)
    with Path(f"{copy}.bin").open("r+b") as stream:
        stream.seek(1001)
        stream.write(b"\x77")
    assert dataset_fingerprint(str(copy))["bin"] != dataset_fingerprint(prefix)["bin"]
    assert dataset_fingerprint(str(copy))["idx"] == dataset_fingerprint(prefix)["idx"]


@pytest.mark.parametrize("apart", [False, True])
def test_other_values_beside_losses(prefix: str, tmp_path: Path, apart: bool) -> None:
    """They are stored as if documents saw each other, whatever the run does."""
    sections = []
    for directory, keeps_apart in (("losses", apart), ("values", False)):
        windows = DocumentWindows(IndexedDataset(prefix), SCORED_LENGTH, EOD, apart=keeps_apart)
        rows = np.stack([windows[index]["labels"].numpy() for index in range(len(windows))])
        path = tmp_path / directory
        rows = rows.astype(np.int32)
        sections.append(write_cache(path, "document", "positions", len(rows), rows))
    losses, values = ({"positions": section} for section in sections)
    scored = build(prefix, document_scored(losses, external=values), apart=apart)
    alone = build(prefix, document_scored(None, mask=values), apart=apart)
    for index in range(0, len(scored), 7):
        sample, other = scored[index], alone[index]
        wanted = sample["labels"] / 1000
        for found in (sample["reference_losses"], sample["external"], other["mask"]):
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-6)
        assert "reference_losses" not in other
