"""Each input is read once, what is left out is named, and no output of this program is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from corpus import MODEL, Result, ids_of, preprocess, read_dataset, run_tool, texts, write_jsonl
from megatron_slm.corpus.reading import inputs
from megatron_slm.errors import UserError
from megatron_slm.files import alone_at


def read(directory: Path, *sources: object, more: tuple[object, ...] = ()) -> Result:
    """Run the tool with its output outside the directory."""
    return preprocess(sources, directory / "elsewhere" / "out", *more, check=False)


def documents(directory: Path) -> list[tuple[int, ...]]:
    return read_dataset(directory / "elsewhere" / "out_text_document")


def ids(*found: str) -> list[tuple[int, ...]]:
    return [ids_of(text, eod=False) for text in found]


def write(directory: Path, *names: str) -> None:
    """Files of one document each: their own name."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [name])


def test_hidden_directories(tmp_path: Path) -> None:
    """Also those that Spark hides; what is named is read."""
    names = (
        *("a.jsonl", "_b.jsonl", "_c=1/part-0.jsonl"),
        *(".cache/x/b.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".e.jsonl"),
        *("_temporary/0/task_1/part-0.jsonl", "_delta_log/0.json"),
    )
    write(tmp_path / "in", *names)
    (tmp_path / "in" / "_SUCCESS").touch()
    shown = read(tmp_path, tmp_path / "in").err
    for word in (".cache", ".ipynb_checkpoints", "_temporary", "1 files of other kinds (_SUCCESS)"):
        assert word in shown or "..." in shown
    assert documents(tmp_path) == ids("_b.jsonl", "_c=1/part-0.jsonl", "a.jsonl")
    for pattern in ("**/*.jsonl", "*/**/*.jsonl", "*"):
        assert read(tmp_path, f"{tmp_path}/in/{pattern}").code == 0
        assert not set(documents(tmp_path)) & set(ids(*names[5:])), pattern
    for name in (".e.jsonl", "_temporary", ".cache", "_temporary/0/*/*.jsonl", "_t*/0/*/*.jsonl"):
        assert read(tmp_path, tmp_path / "in" / name).code == 0
        assert len(documents(tmp_path)) == 1, name


def hard_link(directory: Path) -> None:
    os.link(directory / "a.jsonl", directory / "b.jsonl")


def link(directory: Path) -> None:
    (directory / "b.jsonl").symlink_to("a.jsonl")


def link_to_a_directory(directory: Path) -> None:
    (directory / "b").symlink_to(".")


def two_loops(directory: Path) -> None:
    """Of which a pattern follows two to the power of forty paths."""
    for name in ("b", "c"):
        (directory / name).symlink_to(".")


LINKS: list[Callable[[Path], None]] = [hard_link, link, link_to_a_directory, two_loops]


@pytest.mark.parametrize("make", LINKS)
def test_one_file_by_several_paths(tmp_path: Path, make: Callable[[Path], None]) -> None:
    write(tmp_path / "in", "a.jsonl")
    make(tmp_path / "in")
    for source in ("in", "in/**/*.jsonl", "in/**", "in/*"):
        assert read(tmp_path, tmp_path / source).code == 0
        assert documents(tmp_path) == ids("a.jsonl"), source
    if (tmp_path / "in" / "b.jsonl").exists():
        both = [tmp_path / "in" / name for name in ("a.jsonl", "b.jsonl")]
        for given in (both, [tmp_path / "in", both[0]], [both[0], tmp_path / "in" / "*"]):
            result = read(tmp_path, *given)
            assert result.code == 2 and "twice" in result.err


def test_a_mount_of_the_same_directory(tmp_path: Path) -> None:
    write(tmp_path / "in", "a/x.jsonl")
    (tmp_path / "in" / "b").mkdir()
    command = ["mount", "--bind", tmp_path / "in" / "a", tmp_path / "in" / "b"]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount a directory")
    try:
        assert read(tmp_path, tmp_path / "in").code == 0
    finally:
        subprocess.run(["umount", tmp_path / "in" / "b"], check=True)
    assert documents(tmp_path) == ids("a/x.jsonl")


def test_what_a_pattern_matches_is_read_or_named(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", "b.jsonl/part-0.jsonl")
    (tmp_path / "in" / "b.jsonl" / "_SUCCESS").touch()
    assert read(tmp_path, tmp_path / "in" / "*.jsonl").code == 0
    assert documents(tmp_path) == ids("a.jsonl", "b.jsonl/part-0.jsonl")
    (tmp_path / "in" / "c.jsonl").symlink_to("/nowhere/c.jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "d").symlink_to("/nowhere/d")
    for source, name in (("in/*.jsonl", "c.jsonl"), ("in", "c.jsonl"), ("other", "d")):
        result = read(tmp_path, tmp_path / source)
        assert result.code == 2 and f"{name} is a link to /nowhere/{name}" in result.err


def test_output_inside_the_input(tmp_path: Path) -> None:
    """The same command again changes nothing; other runs' outputs are no input either."""
    data = tmp_path / "data"
    write(data, "a.jsonl", "b.jsonl")
    (data / "a.jsonl").write_bytes((data / "a.jsonl").read_bytes() + b'{"text": null}\n')
    more = ("--max-reject-fraction", "0.5", "--shard-size", "1K")
    for name, options in (("web", ()), ("all", ("--no-merge",)), ("part", ("--stage", "tokenize"))):
        preprocess(data, data / name, *more, *options)
    write(data, "mix.manifest.json")
    (data / "mix.data-args.txt").write_text("1 web_text_document")
    for source in (data, f"{data}/**/*.json*", f"{data}/*"):
        again = preprocess(source, data / "web", *more)
        assert "nothing to do" in again.err and "written by this program" in again.err
        assert read_dataset(data / "web_text_document") == ids("a.jsonl", "b.jsonl")
    (rejects,) = (data / "web_rejects").iterdir()
    given = [data / "a.jsonl", data / "b.jsonl", data / "web_text_document.manifest.json", rejects]
    assert "nothing to do" in preprocess(given, data / "web", *more).err
    assert read(tmp_path, rejects, more=("--json-keys", "content")).code == 0


def test_logs_of_datatrove_are_no_input(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", "logs/tokenize/executor.json", "logs/tokenize/stats/0.json")
    (tmp_path / "in" / "logs" / "tokenize" / "logs").mkdir()
    assert read(tmp_path, tmp_path / "in").code == 0
    assert documents(tmp_path) == ids("a.jsonl")


def test_what_another_option_names_is_no_input(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl")
    long = " ".join(map(str, range(20)))
    evaluation = write_jsonl(tmp_path / "in" / "test.jsonl", [long, "short"])
    shutil.copy(MODEL, tmp_path / "in" / "tokenizer.json")
    more = ("--decontaminate", evaluation, "--tokenizer-model", tmp_path / "in" / "tokenizer.json")
    result = read(tmp_path, tmp_path / "in", more=more)
    assert result.code == 0 and "2 named by another option" in result.err
    assert documents(tmp_path) == ids("a.jsonl")
    result = read(tmp_path, evaluation, more=more)
    assert result.code == 2 and "which another option names, too" in result.err


def test_pipes(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl")
    os.mkfifo(tmp_path / "in" / "b.jsonl")
    for source in ("in", "in/*", "in/b.jsonl"):
        result = read(tmp_path, tmp_path / source)
        assert result.code == 2 and "b.jsonl is not a regular file" in result.err
        assert "--input -" in result.err


def test_fields_beside_the_one_that_filters(tmp_path: Path) -> None:
    """Are not read: they may be of times that Python has no type for."""
    years = pyarrow.array([2**60, 1], pyarrow.timestamp("us"))
    meta = pyarrow.StructArray.from_arrays([pyarrow.array(["en", "de"]), years], ["lang", "when"])
    table = pyarrow.table({"text": ["one", "two"], "meta": meta})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    assert read(tmp_path, tmp_path / "in.parquet", more=("--filter", "meta.lang=en")).code == 0
    assert documents(tmp_path) == ids("one")
    result = read(tmp_path, tmp_path / "in.parquet", more=("--filter", "meta.when=x"))
    assert result.code == 2 and "in.parquet:1: has a value that cannot be read" in result.err


def test_why_nothing_is_left(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["one", "two"], lang="en")
    result = read(tmp_path, source, more=("--filter", "lang=de"))
    assert "--filter lang=de leaves none of 2 documents: nothing to write" in result.err
    source.write_text("{}\n{}\n")
    result = read(tmp_path, source, more=("--max-reject-fraction", 1))
    assert "no document is left under 'text' (2 rejects): nothing to write" in result.err


def test_the_directory_of_the_output_is_made(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    result = preprocess(source, tmp_path / "new" / "data" / "web")
    assert read_dataset(tmp_path / "new" / "data" / "web_text_document") == ids("one")
    assert "no --append-eod: no token marks where a document ends" in result.err
    assert "--append-eod" not in preprocess(source, tmp_path / "other", "--append-eod").err


def test_a_library_that_is_missing_is_missed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    missing = {"rensa", "zstandard", "pyarrow"}
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    for package, options in (("rensa", ("--dedup", "near")),):
        result = preprocess(source, tmp_path / "out", *options, check=False)
        assert result.code == 2 and f"needs {package}: pip install" in result.err
        assert "fingerprint" not in result.err
    for package, name in (("zstandard", "b.jsonl.zst"), ("pyarrow", "c.parquet")):
        magic = {"b.jsonl.zst": b"\x28\xb5\x2f\xfd", "c.parquet": b"PAR1"}[name]
        (tmp_path / name).write_bytes(magic)
        with pytest.raises(UserError, match=f"{name} needs {package}: pip install"):
            inputs.open_piece(str(tmp_path / name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    more = ("--dedup", "exact", "--engine", "kitoken")
    result = preprocess(source, tmp_path / "out", *more, check=False)
    assert result.code == 2 and "--engine kitoken is not installed" in result.err
    assert "fingerprint" not in result.err


def test_a_file_of_others_in_the_place_of_an_output(tmp_path: Path) -> None:
    """Files, links and directories: one line names them, and they stay."""
    source = write_jsonl(tmp_path / "in.jsonl", ["one"])
    for name in ("out_text_document.bin", "out_shards", "out_rejects"):
        path = tmp_path / name
        for make in (path.touch, path.mkdir, lambda path=path: path.symlink_to("/nowhere")):
            if name != "out_text_document.bin" and make == path.mkdir:
                continue
            make()
            result = preprocess(source, tmp_path / "out", check=False)
            assert result.code == 2 and f"{path}" in result.err.splitlines()[-1], name
            assert os.path.lexists(path)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            for made in ("out_shards", "out_rejects"):
                shutil.rmtree(tmp_path / made, ignore_errors=True)
    assert preprocess(source, tmp_path / "out").code == 0


def test_a_mix_takes_no_datasets_name(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts()[:20])
    preprocess(source, tmp_path / "out")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"budget: 5\nsources: [{{name: a, data: {tmp_path}/out_text_document}}]\n")
    path = tmp_path / "out_text_document.manifest.json"
    before = path.read_bytes()
    prefix = path.with_name("out_text_document")
    result = run_tool("build_mix", recipe, "--output-prefix", prefix)
    assert result.code == 2 and "a dataset has that name" in result.err
    assert path.read_bytes() == before
    (tmp_path / "new").mkdir()
    with alone_at(tmp_path / "new" / "mix.manifest.json", "a test"):
        result = run_tool("build_mix", recipe, "--output-prefix", tmp_path / "new" / "mix")
        assert result.code == 2 and "another run on this machine is writing" in result.err
    (tmp_path / "new").rmdir()
    result = run_tool("build_mix", recipe, "--output-prefix", tmp_path / "new" / "mix")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "new" / "mix.manifest.json").read_text())["budget"] == 5
    result = run_tool("verify_dataset", tmp_path / "new" / "mix")
    assert result.code == 2 and f"--data-args-path {tmp_path}/new/mix.data-args.txt" in result.err
