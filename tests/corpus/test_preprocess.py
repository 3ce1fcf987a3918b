"""tools/preprocess_data.py against sentencepiece called directly and a reader of our own."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from corpus import (
    MODEL,
    PIECES,
    TOOLS,
    ids_of,
    left_behind,
    preprocess,
    read_dataset,
    texts,
    write_jsonl,
)
from megatron_slm.corpus.preprocessing import output_paths

TEXTS = texts()
WITHOUT_TEXT = [""]  # gives no tokens, so no document


def compress(path: Path, kind: str) -> Path:
    """In two members or frames, as writers that append leave it."""
    data = path.read_bytes()
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    to = path.with_name(f"{path.name}.{kind}")
    pack = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
    to.write_bytes(b"".join(map(pack, halves)))
    return to


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "plain.jsonl", [*TEXTS, *WITHOUT_TEXT])


@pytest.mark.parametrize("shard_size", ["256M", "20K"])
def test_plain_jsonl(plain: Path, tmp_path: Path, shard_size: str) -> None:
    """Lines are whole, in order, and each is in one shard only, wherever shards are cut."""
    plain.write_bytes(b"\n \r\n" + plain.read_bytes().removesuffix(b"\n"))
    result = preprocess(plain, tmp_path / "out", "--append-eod", "--shard-size", shard_size)
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(text) for text in TEXTS]
    assert "1 empty, 2 blank lines" in result.out
    prefix = "out_text_document."
    names = {f"{prefix}bin", f"{prefix}idx", f"{prefix}manifest.json"}
    assert left_behind(tmp_path, plain) == names
    manifest = json.loads((tmp_path / f"{prefix}manifest.json").read_text())
    assert (len(manifest["shards"]) > 5) == (shard_size == "20K")
    assert manifest["counts"] == {
        "documents": len(TEXTS),
        "tokens": sum(len(ids_of(text)) for text in TEXTS),
    }


@pytest.mark.parametrize("size", [1, 29, 64, 85])
def test_shards_of_a_few_bytes(tmp_path: Path, size: int) -> None:
    """Cuts at, before and behind line ends, and shards in which no line begins."""
    found = ["a", "b" * 30, "", "c", "d" * 50, "e"]
    source = write_jsonl(tmp_path / "in.jsonl", found)
    preprocess(source, tmp_path / "out", "--shard-size", size)
    expected = [ids_of(text, eod=False) for text in found if text]
    assert read_dataset(tmp_path / "out_text_document") == expected


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed(plain: Path, tmp_path: Path, kind: str) -> None:
    preprocess(compress(plain, kind), tmp_path / "out", "--append-eod")
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(text) for text in TEXTS]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"n": range(len(TEXTS)), "text": pyarrow.array(TEXTS, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=100)
    preprocess(tmp_path / "in.parquet", tmp_path / "out", "--append-eod")
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(text) for text in TEXTS]


def test_directories_patterns_and_order(tmp_path: Path) -> None:
    """Small files share shards; what is no input is passed over."""
    for name, text in {"b/2.jsonl": "two", "b/1.jsonl": "one", "a.jsonl": "three"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [text])
    (tmp_path / "b" / "SHA256SUMS").write_text("not an input")
    preprocess([tmp_path / "b", tmp_path / "*.jsonl"], tmp_path / "out")
    assert read_dataset(tmp_path / "out_text_document") == [
        ids_of(text, eod=False) for text in ("one", "two", "three")
    ]


def test_standard_input(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(plain.read_bytes())))
    preprocess("-", tmp_path / "out", "--append-eod", "--shard-size", "50K")
    assert read_dataset(tmp_path / "out_text_document") == [ids_of(text) for text in TEXTS]
    assert len(left_behind(tmp_path, plain)) == 3


def run_command(command: list[Any]) -> str:
    """Run a command, and return its stderr."""
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return str(run.stderr)


def test_workers_make_the_same_files(plain: Path, tmp_path: Path) -> None:
    """From the command line, with real worker processes, which are forked from one that has read
    parquet with Arrow's threads."""
    packed, columns = compress(plain, "zst"), tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), columns, row_group_size=100)
    command = [sys.executable, TOOLS / "preprocess_data.py", "--input", plain, packed, columns]
    command += ["--tokenizer-model", MODEL, "--append-eod", "--shard-size", "30K"]
    for workers in (1, 2):
        more = ["--output-prefix", tmp_path / f"out{workers}", "--workers", str(workers)]
        run = run_command([*command, *more])
        assert "gigatoken" in run and "tok/s" in run
    for suffix in ("bin", "idx", "manifest.json"):
        one, two = (tmp_path / f"out{n}_text_document.{suffix}" for n in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    expected = [ids_of(text) for text in TEXTS]
    assert read_dataset(tmp_path / "out1_text_document") == expected * 3


def test_two_keys_filter_bos(tmp_path: Path) -> None:
    rows = [
        {"question": text, "answer": text[::-1], "meta": {"set": "ab"[at % 2]}, "n": at % 3}
        for at, text in enumerate(TEXTS[:100])
    ]
    rows[8]["answer"] = ""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    keys = ("--json-keys", "question", "answer")
    filters = ("--filter", "meta.set=a", "--filter", "n=2")
    result = preprocess(source, tmp_path / "out", *keys, *filters, "--prepend-bos")
    kept = [row for row in rows if row["meta"] == {"set": "a"} and row["n"] == 2]
    assert 0 < len(kept) < 50
    for key in ("question", "answer"):
        assert read_dataset(tmp_path / f"out_{key}_document") == [
            (PIECES.bos_id(), *ids_of(str(row[key]), eod=False)) for row in kept if row[key]
        ]
    assert f"{len(rows) - len(kept)} filtered" in result.out


def test_chat(tmp_path: Path) -> None:
    template = Path(__file__).parents[2] / "examples" / "mixes" / "chatml.jinja"
    conversations = [
        [{"from": "human", "value": "Why? "}, {"from": "gpt", "value": "So.</s>"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"c": c}) + "\n" for c in conversations))
    preprocess(source, tmp_path / "out", "--json-key", "c", "--chat-template", template)
    rendered = [
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.</s><|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ]
    documents = read_dataset(tmp_path / "out_c_document")
    assert documents == [ids_of(text, eod=False) for text in rendered]
    assert all(PIECES.eos_id() not in document for document in documents)


def test_rejects_within_the_limit_are_quarantined(tmp_path: Path) -> None:
    """Line numbers are those of the file, also in later shards."""
    source = write_jsonl(tmp_path / "in.jsonl", ["good"] * 1000)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[700:700] = [b'{"text": "cut\n', b'{"text": null}\n']
    source.write_bytes(b"".join(lines))
    options = ("--shard-size", "3K", "--max-reject-fraction", "0.01")
    result = preprocess(source, tmp_path / "out", *options)
    assert "left out: 2 rejects" in result.out
    assert len(read_dataset(tmp_path / "out_text_document")) == 1000
    rejects = [
        json.loads(line)
        for path in sorted((tmp_path / "out_rejects").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [(reject["file"], reject["line"]) for reject in rejects] == [
        (str(source), 701),
        (str(source), 702),
    ]
    assert rejects[0]["content"] == '{"text": "cut' and "'text' is null" in rejects[1]["reason"]

    result = preprocess(source, tmp_path / "out", "--shard-size", "3K", check=False)
    assert result.code == 2 and "2 of 1002 documents could not be used" in result.err
    options = ("--filter", "id=5", "--max-reject-fraction", "0.01")  # of all that are read
    result = preprocess(source, tmp_path / "filtered", *options)
    assert "1,000 filtered, 1 rejects" in result.out


def made_again(err: str) -> set[str]:
    return {line.split(":")[0][2:] for line in err.splitlines() if "made again" in line}


@pytest.mark.parametrize("merge", ["--merge", "--no-merge"])
def test_only_what_changed_is_done_again(tmp_path: Path, merge: str) -> None:
    """Also from a dataset whose shards are merged and gone."""
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", TEXTS[n::3]) for n in range(3)]
    options = ("--append-eod", "--shard-size", "10K", merge)
    preprocess(inputs, tmp_path / "out", *options)
    os.utime(inputs[0])  # the same content
    assert "nothing to do" in preprocess(inputs, tmp_path / "out", *options).err

    write_jsonl(inputs[1], [text.upper() for text in TEXTS[1::3]])
    err = preprocess(inputs, tmp_path / "out", *options).err
    assert made_again(err) and all(name.startswith("1.jsonl") for name in made_again(err))
    (tmp_path / "fresh").mkdir()
    preprocess(inputs, tmp_path / "fresh" / "out", *options)
    changed, fresh = (
        {
            name: (directory / name).read_bytes()
            for name in left_behind(directory)
            if name.startswith("out") and name.endswith(("bin", "idx"))
        }
        for directory in (tmp_path, tmp_path / "fresh")
    )
    assert changed == fresh and changed

    err = preprocess(inputs, tmp_path / "out", *options, "--prepend-bos").err
    assert "other prepend bos" in err


def shard_times(prefix: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime_ns for path in Path(f"{prefix}_shards").glob("*.bin")}


def test_inputs_are_added_and_removed(tmp_path: Path) -> None:
    """What is not new stays as it is, wherever small files, large ones or directories are added;
    what is no input any more is gone."""
    old = tmp_path / "corpus" / "old"
    old.mkdir(parents=True)
    for at in range(40):
        write_jsonl(old / f"{at:02}.jsonl", ["x" * 400 + str(at), f"{at}"])
    options = ("--shard-size", "2K", "--no-merge")
    preprocess(old, tmp_path / "out", *options)
    before = shard_times(tmp_path / "out")
    assert 1 < len(before) < 40, "nearly half of them are a task's last, by their paths"

    new = tmp_path / "corpus" / "new"
    new.mkdir()
    write_jsonl(new / "00.jsonl", TEXTS[:5])
    write_jsonl(old / "17-small.jsonl", ["added"])
    write_jsonl(old / "27-large.jsonl", TEXTS[:100])
    preprocess([new, old], tmp_path / "out", *options)
    after = shard_times(tmp_path / "out")
    again = {name for name in before if after.get(name) != before[name]}
    assert len(again) <= 2, "those that the two files are in the middle of"
    fresh = tmp_path / "fresh"
    preprocess([new, old], fresh, *options)
    assert {name: Path(f"{fresh}_shards", name).read_bytes() for name in shard_times(fresh)} == {
        name: (tmp_path / "out_shards" / name).read_bytes() for name in after
    }

    preprocess(old, tmp_path / "out", *options)
    assert set(shard_times(tmp_path / "out")) < set(after)
    write_jsonl(old / "99.jsonl", ["added"])
    preprocess(old, tmp_path / "out")
    documents = [
        ids_of(json.loads(line)["text"], eod=False)
        for path in sorted(old.iterdir())
        for line in path.read_text().splitlines()
    ]
    assert read_dataset(tmp_path / "out_text_document") == documents


def test_an_input_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["x"])
    monkeypatch.chdir(tmp_path)
    result = preprocess([source, "in.jsonl"], tmp_path / "out", check=False)
    assert result.code == 2 and "--input names in.jsonl twice" in result.err


def test_a_dataset_of_another_program_is_left_alone(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])
    files = {tmp_path / f"out_text_document.{suffix}": suffix.encode() for suffix in ("bin", "idx")}
    for path, content in files.items():
        path.write_bytes(content)
    result = preprocess(source, tmp_path / "out", check=False)
    assert result.code == 2 and "exists and has no manifest" in result.err
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("end", ["shards", "rejects"])
def test_files_of_others_are_left_alone(tmp_path: Path, end: str) -> None:
    """A corpus whose directory has a name that this program would give."""
    corpus = tmp_path / f"web_{end}"
    corpus.mkdir()
    raw = write_jsonl(corpus / "raw.jsonl", TEXTS)
    content = raw.read_bytes()
    result = preprocess(corpus, tmp_path / "web", check=False)
    assert result.code == 2 and f"{raw} is not of this program's making" in result.err
    assert raw.read_bytes() == content and not list(tmp_path.glob("web_text*"))


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    """Also from directories of its own making."""
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(source, tmp_path / "out", "--no-merge")
    notes = {tmp_path / "out_shards" / ".notes.json", tmp_path / "out_rejects" / ".notes.jsonl"}
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a note")
    preprocess(source, tmp_path / "out")
    assert {path for path in tmp_path.glob("out_*/*")} == notes


def test_another_key_s_dataset_stays(tmp_path: Path) -> None:
    """It was not merged, so the directory of shards, which a merge empties, is where it is."""
    source = write_jsonl(tmp_path / "in.jsonl", texts()[:50], title="A title")
    options = ("--shard-size", "4K")
    preprocess(source, tmp_path / "out", "--json-keys", "title", "--no-merge", *options)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*_title_document*")}
    for _ in range(2):
        preprocess(source, tmp_path / "out", *options)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*_title_document*")} == before
        assert not list(tmp_path.rglob("out_shards/*_text_document*"))
    preprocess(source, tmp_path / "out", "--json-keys", "title", *options)
    assert not (tmp_path / "out_shards").exists()


def test_an_empty_directory_does_not_make_a_dataset_ours(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])
    (tmp_path / "out_shards").mkdir()
    index = tmp_path / "out_text_document.idx"
    index.write_bytes(b"another's")
    result = preprocess(source, tmp_path / "out", check=False)
    assert result.code == 2 and "exists and has no manifest" in result.err
    assert index.read_bytes() == b"another's"


def test_no_dataset_if_one_of_two_would_have_no_documents(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS[:9], a="")
    options = ("--json-keys", "text", "a")
    result = preprocess(source, tmp_path / "out", *options, check=False)
    assert result.code == 2 and "no document has any text under 'a'" in result.err
    assert not list(tmp_path.glob("out_*_document*"))


def test_the_engine_that_is_named_makes_all_shards(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess(source, tmp_path / "out", "--engine", "kitoken")
    assert "nothing to do" in preprocess(source, tmp_path / "out", "--engine", "auto").err
    said = preprocess(source, tmp_path / "out", "--engine", "sentencepiece").err
    assert "made again: made by kitoken" in said
    manifest = json.loads((tmp_path / "out_text_document.manifest.json").read_text())
    (shard,) = manifest["shards"]
    assert shard["engine"] == "sentencepiece"
    assert shard["engine_version"] == f"sentencepiece {version('sentencepiece')}"


@pytest.mark.parametrize("name", ["out put/out", "out/in put.jsonl", "out/key"])
def test_a_space_in_a_list_of_paths_is_refused(tmp_path: Path, name: str) -> None:
    """At once: Megatron would split it without a word."""
    directory = (tmp_path / name).parent
    directory.mkdir()
    source = write_jsonl(directory / ("in put.jsonl" if "in" in name else "in"), TEXTS)
    write_jsonl(source, TEXTS, **{"the key": "x"})
    options = ["--json-keys", "the key"] if "key" in name else []
    result = preprocess(source, directory / "out", *options, "--no-merge", check=False)
    assert result.code == 2 and "would have a space" in result.err
    assert not list(directory.glob("out_shards/*"))
    preprocess(source, directory / "out", *options)


def test_another_run_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the directory; a run that makes datasets of it is alone in it."""
    monkeypatch.setattr(output_paths, "LOCK_WAIT", 0.2)
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    with output_paths.OutputPaths(str(tmp_path / "out"), ("text",)).claim(alone=True):
        result = preprocess(source, tmp_path / "out", check=False)
        assert result.code == 2 and "another run on this machine" in result.err
        preprocess(source, tmp_path / "other")
        preprocess(source, tmp_path / "out", "--stage", "tokenize")
    assert "engine" not in preprocess(source, tmp_path / "out").err


@pytest.mark.parametrize("stage", ["fingerprint", "duplicates", "tokenize"])
def test_another_rank_at_the_same_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Of other options: files of two runs would be taken for those of one."""
    monkeypatch.setattr(output_paths, "LOCK_WAIT", 0.2)
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    options = ("--dedup", "exact", "--stage")
    for name in ("fingerprint", "duplicates", "tokenize"):
        preprocess(source, tmp_path / "out", *options, name)
    endings = {"fingerprint": ".fingerprints.json", "duplicates": "verdicts.manifest.json"}
    (done,) = (
        path
        for path in (tmp_path / "out_shards").glob("*.json")
        if path.name.endswith(endings.get(stage, "0.json"))
    )
    done.unlink()
    part = Path(str(done).removesuffix(".manifest.json"))
    with output_paths.OutputPaths(str(tmp_path / "out"), ("text",)).alone_on(part):
        result = preprocess(source, tmp_path / "out", *options, stage, check=False)
        assert result.code == 2 and f"another run on this machine is writing {part}" in result.err
    preprocess(source, tmp_path / "out", *options, stage)
    assert done.exists()


def test_ranks_know_a_dataset_that_is_not_in_its_place_yet(plain: Path, tmp_path: Path) -> None:
    """As a merge leaves it that is killed when all is written."""
    preprocess(plain, tmp_path / "out")
    whole = {name: (tmp_path / name).read_bytes() for name in left_behind(tmp_path, plain)}
    for suffix in ("bin", "idx"):
        path = tmp_path / f"out_text_document.{suffix}"
        path.rename(f"{path}.next")
    manifest = tmp_path / "out_text_document.manifest.json"
    content = json.loads(manifest.read_text())
    manifest.unlink()
    (tmp_path / "out_shards").mkdir()
    decided = {"format": content.pop("format"), "datasets": {"text": content}}
    (tmp_path / "out_shards" / "datasets.next").write_text(json.dumps(decided))
    assert "engine" not in preprocess(plain, tmp_path / "out", "--stage", "tokenize").err
    assert "nothing to do" in preprocess(plain, tmp_path / "out").err
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    assert left_behind(tmp_path, plain) == set(whole)


def test_ranks_share_nothing_but_the_directory(plain: Path, tmp_path: Path) -> None:
    """As a Slurm array does it, in any order, and one rank twice."""
    options = ("--append-eod", "--shard-size", "20K", "--dedup", "exact")
    preprocess(plain, tmp_path / "alone", *options)
    for stage, ranks in {
        "fingerprint": (2, 0, 1),
        "duplicates": (0,),
        "tokenize": (1, 2, 0, 1),
    }.items():
        size = 1 if stage == "duplicates" else 3
        for rank in ranks:
            place = ("--stage", stage, "--rank", rank, "--world-size", size)
            preprocess(plain, tmp_path / "out", *options, *place)
    assert "engine" not in preprocess(plain, tmp_path / "out", *options).err
    for suffix in ("bin", "idx", "manifest.json"):
        ours, alone = (tmp_path / f"{name}_text_document.{suffix}" for name in ("out", "alone"))
        assert ours.read_bytes() == alone.read_bytes()
