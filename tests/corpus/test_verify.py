"""Every way a pair of files can lie is found, by the quick check where it can be."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corpus import MODEL, preprocess, run_tool, texts, write_jsonl
from megatron_slm.corpus.indexed.verify import pairs_of
from megatron_slm.data.dataset_check import check_quickly
from megatron_slm.errors import UserError

TEXTS = texts()[:300]
HEADER = 34


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(source, tmp_path / "out", "--append-eod", "--shard-size", "20K")
    return tmp_path / "out_text_document"


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, 0 if at >= 0 else 2)
        file.write(data)


def idx(prefix: Path) -> Path:
    return Path(f"{prefix}.idx")


def bin_of(prefix: Path) -> Path:
    return Path(f"{prefix}.bin")


def no_manifest(prefix: Path) -> None:
    Path(f"{prefix}.manifest.json").unlink()


def other(prefix: Path, found: list[str]) -> Path:
    """Another dataset beside it."""
    source = write_jsonl(prefix.with_name("other.jsonl"), found)
    preprocess(source, prefix.with_name("other"), "--append-eod")
    return prefix.with_name("other_text_document")


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - size)


def stale_index(prefix: Path) -> None:
    no_manifest(prefix)
    idx(other(prefix, TEXTS[:-1])).replace(idx(prefix))


def stale_index_of_the_same_size(prefix: Path) -> None:
    no_manifest(prefix)
    idx(other(prefix, [*TEXTS[1:], "one of another length"])).replace(idx(prefix))


def swapped_lengths(prefix: Path) -> None:
    """Swap two lengths, which leaves the total number of tokens right."""
    no_manifest(prefix)
    lengths = np.fromfile(idx(prefix), "<i4", 300, offset=HEADER)
    patch(idx(prefix), HEADER, lengths[[1, 0, *range(2, 300)]].tobytes())


def wrong_dtype(prefix: Path) -> None:
    """As if the ids were of 32 bits."""
    patch(idx(prefix), 17, b"\x04")


def signed_dtype(prefix: Path) -> None:
    """Of the same width."""
    patch(idx(prefix), 17, b"\x03")


def float_dtype(prefix: Path) -> None:
    patch(idx(prefix), 17, b"\x06")


def document_ends(prefix: Path) -> None:
    patch(idx(prefix), -8, struct.pack("<q", 299))


def empty(prefix: Path) -> None:
    idx(prefix).write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8))


QUICKLY: dict[str, tuple[Callable[[Path], object], str]] = {
    "no .bin": (lambda prefix: bin_of(prefix).unlink(), "cannot read"),
    "no .idx": (lambda prefix: idx(prefix).unlink(), "cannot read"),
    "truncated .bin": (lambda prefix: truncate(bin_of(prefix), 2), "truncated"),
    "a byte too much": (lambda prefix: bin_of(prefix).open("ab").write(b"x"), "truncated, or"),
    "truncated .idx": (lambda prefix: truncate(idx(prefix), 1), "truncated or damaged"),
    "longer .idx": (lambda prefix: idx(prefix).open("ab").write(b"x"), "truncated or damaged"),
    "cut header": (lambda prefix: truncate(idx(prefix), idx(prefix).stat().st_size - 20), "first"),
    "no index at all": (lambda prefix: idx(prefix).write_bytes(b"x" * 500), "first bytes differ"),
    "version": (lambda prefix: patch(idx(prefix), 9, b"\x02"), "version 2"),
    "unknown dtype": (lambda prefix: patch(idx(prefix), 17, b"\x63"), "dtype code 99"),
    "wrong dtype": (wrong_dtype, "not of the same dataset"),
    "signed": (signed_dtype, "ids are of type int16, but by its manifest they are uint16"),
    "floats": (float_dtype, "float64"),
    "stale .idx": (stale_index, "not of the same dataset"),
    "swapped lengths": (swapped_lengths, "the one before it ends"),
    "document ends": (document_ends, "do not end with"),
    "no documents": (empty, "no documents"),
    "damaged manifest": (
        lambda prefix: Path(f"{prefix}.manifest.json").write_bytes(b"{"),
        "is damaged",
    ),
    "manifest of another": (
        lambda prefix: Path(f"{other(prefix, TEXTS[5:])}.manifest.json").replace(
            f"{prefix}.manifest.json"
        ),
        "its manifest",
    ),
}


@pytest.mark.parametrize("kind", QUICKLY)
def test_found_quickly(kind: str, prefix: Path) -> None:
    spoil, message = QUICKLY[kind]
    spoil(prefix)
    result = run_tool("verify_dataset", prefix, "--quick")
    assert result.code == 2 and "Traceback" not in result.err
    assert message in result.err and str(prefix.parent) in result.err


def id_beyond(prefix: Path) -> None:
    no_manifest(prefix)
    patch(bin_of(prefix), 200, b"\xff\xff")


def id_of_one_too_many(prefix: Path) -> None:
    no_manifest(prefix)
    patch(bin_of(prefix), 200, struct.pack("<H", 32000))


def other_id(prefix: Path) -> None:
    patch(bin_of(prefix), 40_000, b"\x07\x00\x07\x00")


def negative_length(prefix: Path) -> None:
    """Where the quick check does not look."""
    no_manifest(prefix)
    lengths = np.fromfile(idx(prefix), "<i4", 300, offset=HEADER)
    lengths[1], lengths[2] = lengths[1] + lengths[2] + 5, -5
    patch(idx(prefix), HEADER, lengths.tobytes())


def shifted_offset(prefix: Path) -> None:
    no_manifest(prefix)
    offsets = np.fromfile(idx(prefix), "<i8", 300, offset=HEADER + 1200)
    offsets[2] += 2
    patch(idx(prefix), HEADER + 1200, offsets.tobytes())


def documents_out_of_order(prefix: Path) -> None:
    no_manifest(prefix)
    patch(idx(prefix), HEADER + 3600 + 8 * 7, struct.pack("<q", 200))


def other_text(prefix: Path) -> None:
    """Right by all its hashes, but of a text that has changed since."""
    write_jsonl(prefix.with_name("in.jsonl"), [text.upper() for text in TEXTS])


WHOLLY: dict[str, tuple[Callable[[Path], object], str]] = {
    "id beyond": (id_beyond, "token 100, in sequence"),
    "id of one too many": (id_of_one_too_many, "has id 32000, which a vocabulary of 32000"),
    "other id": (other_id, "is not what its manifest describes"),
    "same size": (stale_index_of_the_same_size, "truncated, or"),
    "negative length": (negative_length, "begins at byte"),
    "shifted offset": (shifted_offset, "begins at byte"),
    "documents out of order": (documents_out_of_order, "document 7 ends before it begins"),
    "other text": (other_text, "has the ids of the text in"),
}


@pytest.mark.parametrize("kind", WHOLLY)
def test_found_wholly(kind: str, prefix: Path) -> None:
    spoil, message = WHOLLY[kind]
    spoil(prefix)
    deep = ["--deep"] if kind == "other text" else []
    result = run_tool("verify_dataset", prefix, "--tokenizer-model", MODEL, *deep)
    assert result.code == 2 and "Traceback" not in result.err
    assert message in result.err


@pytest.mark.parametrize("cleaning", [(), ("--dedup", "exact")])
@pytest.mark.parametrize("merge", ["--merge", "--no-merge"])
def test_what_is_right_passes(tmp_path: Path, merge: str, cleaning: tuple[str, ...]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [*TEXTS, *TEXTS, *("again", "and again") * 40])
    options = ("--append-eod", "--prepend-bos", "--shard-size", "20K", merge, *cleaning)
    preprocess(source, tmp_path / "out", *options)
    arguments = (tmp_path / "out_text_document", "--deep", "--tokenizer-model", MODEL)
    result = run_tool("verify_dataset", *arguments)
    assert result.code == 0, result.err
    shards = [shard for shard in result.out.splitlines() if "tokenized again" in shard]
    assert (len(shards) > 1) == (merge == "--no-merge")


@pytest.mark.parametrize("cleaning", [(), ("--dedup", "exact")])
@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_deep_looks_behind_the_beginning(
    tmp_path: Path, name: str, cleaning: tuple[str, ...]
) -> None:
    """All of a shard's texts but the first 100 are others, of the same sizes."""
    source = tmp_path / name

    def write(found: list[str]) -> None:
        lines = write_jsonl(tmp_path / "plain", found).read_bytes()
        source.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)

    write(TEXTS)
    preprocess(source, tmp_path / "out", "--append-eod", *cleaning)
    arguments = (tmp_path / "out_text_document", "--deep", "--tokenizer-model", MODEL)
    assert "64 tokenized again" in run_tool("verify_dataset", *arguments).out
    write([*TEXTS[:100], *(text[::-1] for text in TEXTS[100:])])
    result = run_tool("verify_dataset", *arguments)
    assert result.code == 2 and "out_text_document: " in result.err
    assert "text in" in result.err or "is not in in.jsonl" in result.err


def test_deep_wants_the_chat_template(tmp_path: Path) -> None:
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps({"text": [{"role": "user", "content": "Hello"}]}))
    template, another = tmp_path / "a.jinja", tmp_path / "another.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    another.write_text("{% for message in messages %}{{ message.role }}{% endfor %}")
    preprocess(source, tmp_path / "with", "--chat-template", template)
    preprocess(write_jsonl(tmp_path / "in.jsonl", ["Hello"]), tmp_path / "without")

    def deep(name: str, *more: object) -> str:
        arguments = (tmp_path / f"{name}_text_document", "--deep", "--tokenizer-model", MODEL)
        result = run_tool("verify_dataset", *arguments, *more)
        return result.err if result.code == 2 else result.out

    assert "was made with a chat template: see --chat-template" in deep("with")
    assert "with another chat template" in deep("with", "--chat-template", another)
    assert "without a chat template" in deep("without", "--chat-template", template)
    assert "1 tokenized again" in deep("with", "--chat-template", template)


MISSING = """
    merged options options.tokenizer options.tokenizer.vocab_size options.tokenizer.sha256
    options.chat_template bin bin.size idx.sha256 shards shards.0.outputs shards.0.inputs
    shards.0.outputs.text.bin.sha256 shards.0.outputs.text.documents
"""


@pytest.mark.parametrize("field", MISSING.split())
def test_a_manifest_that_lacks_something(prefix: Path, field: str) -> None:
    path = Path(f"{prefix}.manifest.json")
    manifest = json.loads(path.read_text())
    *outer, last = field.split(".")
    inner = manifest
    for name in outer:
        inner = inner[int(name) if name == "0" else name]
    del inner[last]
    path.write_text(json.dumps(manifest))
    deep = ("--deep", "--shards", 99, "--tokenizer-model", MODEL)
    result = run_tool("verify_dataset", prefix, *deep)
    assert result.code == 2 and f"missing required field `{last}`" in result.err


def test_a_manifest_that_cannot_be_read(prefix: Path) -> None:
    """It may be whole, so it must not be deleted."""
    manifest = Path(f"{prefix}.manifest.json")
    manifest.rename(prefix.with_name("whole"))
    manifest.symlink_to(manifest)
    with pytest.raises(UserError, match=r"manifest\.json: Too many levels of symbolic links$"):
        check_quickly(prefix)


def test_several_keys_deeply(tmp_path: Path) -> None:
    """A record without one of them gave no document of the others."""
    source = tmp_path / "in.jsonl"
    rows = [{"q": text, "a": text[::-1]} for text in TEXTS[:40]]
    lines = [json.dumps(row) for row in [{"q": "only one"}, *rows]]
    source.write_text("\n".join(lines))
    options = ("--json-keys", "q", "a", "--max-reject-fraction", "0.1")
    preprocess(source, tmp_path / "out", *options)
    for key in ("q", "a"):
        arguments = (tmp_path / f"out_{key}_document", "--deep", "--tokenizer-model", MODEL)
        result = run_tool("verify_dataset", *arguments)
        assert result.code == 0, result.err


def test_of_megatrons_making(tmp_path: Path) -> None:
    """Without a manifest."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.uint16)
    for length in (3, 1, 7):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(str(tmp_path / "own.idx"))
    result = run_tool("verify_dataset", tmp_path / "own", "--vocab-size", 7)
    assert result.code == 0 and "3 sequences, 11 tokens of uint16, no manifest" in result.out
    result = run_tool("verify_dataset", tmp_path / "own", "--vocab-size", 6)
    assert result.code == 2 and "has id 6" in result.err


def test_manifest_ties_it_to_a_vocabulary(prefix: Path) -> None:
    assert (
        check_quickly(prefix, 32000).tokens
        == json.loads(Path(f"{prefix}.manifest.json").read_text())["counts"]["tokens"]
    )
    with pytest.raises(UserError, match="a tokenizer of 32000 tokens, this run's has 31999"):
        check_quickly(prefix, 31999)


@pytest.mark.parametrize("merge", ["--merge", "--no-merge"])
def test_manifest_ties_it_to_a_tokenizer(tmp_path: Path, merge: str) -> None:
    """To the bytes of its file, where a run's is of the same kind; another cannot be compared."""
    model, copy = tmp_path / "tokenizer.model", tmp_path / "a.model.v2"
    other, of_another_kind = tmp_path / "other.model", tmp_path / "tokenizer.json"
    model.write_bytes(MODEL.read_bytes())
    copy.write_bytes(MODEL.read_bytes())
    other.write_bytes(MODEL.read_bytes() + b"\n")
    of_another_kind.write_text("{}")
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(source, tmp_path / "out", merge, "--tokenizer-model", model)
    for prefix, _ in pairs_of(str(tmp_path / "out_text_document")):
        for same in (model, copy, of_another_kind, tmp_path, tmp_path / "absent.model"):
            check_quickly(prefix, tokenizer_model=str(same))
        with pytest.raises(UserError, match="made with another tokenizer than this run's") as told:
            check_quickly(prefix, tokenizer_model=str(other))
        assert prefix in str(told.value) and str(other) in str(told.value)
        manifest = "out_text_document.manifest.json" if merge == "--merge" else "out_shards with"
        assert manifest in str(told.value) and "tokenizer.model" in str(told.value)


def test_a_tokenizer_json_in_a_runs_directory(prefix: Path, tmp_path: Path) -> None:
    path, run = Path(f"{prefix}.manifest.json"), tmp_path / "run"
    manifest = json.loads(path.read_text())
    run.mkdir()
    (run / "tokenizer.json").write_text("{}")
    check_quickly(prefix, tokenizer_model=str(run))
    manifest["options"]["tokenizer"]["name"] = "tokenizer.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another tokenizer"):
        check_quickly(prefix, tokenizer_model=str(run))


def test_a_dataset_that_was_not_merged(tmp_path: Path) -> None:
    """Takes the place of a merged one; its shards have manifests of their own."""
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = ("--shard-size", "20K", "--json-keys", "text")
    preprocess(source, tmp_path / "out", *options)
    preprocess(source, tmp_path / "out", *options, "--no-merge")
    prefix = tmp_path / "out_text_document"
    assert not idx(prefix).exists() and not bin_of(prefix).exists()
    with pytest.raises(UserError, match=r"--data-args-path .*out_text_document\.data-args\.txt"):
        check_quickly(prefix)
    _, shard, *_ = Path(f"{prefix}.data-args.txt").read_text().split()
    check_quickly(shard, 32000)
    with pytest.raises(UserError, match="a tokenizer of 32000 tokens, this run's has 31999"):
        check_quickly(shard, 31999)
    assert run_tool("verify_dataset", shard).code == 0

    source.write_bytes(source.read_bytes() + b"{bad\n")
    failed = preprocess(source, tmp_path / "out", *options, "--no-merge", check=False)
    assert failed.code == 2
    assert not list(tmp_path.glob("out_text_document*"))
