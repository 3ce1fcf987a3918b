"""What import and export write appears whole or not at all, under a name that is theirs alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch import REPOSITORY, SUPPORT, launch
from megatron_slm import files
from megatron_slm.analysis.evaluation.scores import write_scores
from megatron_slm.errors import UserError
from megatron_slm.model.conversion.export_hf import export_hugging_face
from megatron_slm.model.conversion.import_hf import import_hugging_face
from random_llama import save_llama
from small_disk import full_disk

KILLS = 30


def llama(directory: Path, hidden: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 4}
    return save_llama(directory, vocab_size=2000, num_attention_heads=4, **sizes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("small"), 16)


def content(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


class Conversions:
    """Conversions in processes of their own, which have imported everything already."""

    def __init__(self) -> None:
        script = SUPPORT / "forked_conversions.py"
        self.forking = subprocess.Popen(
            [sys.executable, script],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
        assert self.run() == []  # it has imported

    def run(self, *jobs: tuple[str, Path, Path], kill_after: float | None = None) -> list[int]:
        """Exit codes of conversions that run at once."""
        assert self.forking.stdin is not None
        self.forking.stdin.write(json.dumps(jobs, default=str).encode() + b"\n")
        children = self.line()
        if kill_after is not None:
            assert self.forking.stdout is not None
            if not select.select([self.forking.stdout], [], [], kill_after)[0]:
                for child in children:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(child, signal.SIGKILL)
        return self.line()

    def line(self) -> list[int]:
        assert self.forking.stdout is not None
        found: list[int] = json.loads(self.forking.stdout.readline())
        return found


@pytest.fixture(scope="module")
def conversions() -> Iterator[Conversions]:
    started = Conversions()
    yield started
    started.forking.kill()
    started.forking.wait()


def test_killed_at_any_moment(conversions: Conversions, tmp_path: Path) -> None:
    """There is never half a directory, and the run after the last kill ends as one that nothing
    disturbed, beside nothing that the killed ones left."""
    source = llama(tmp_path / "source", 256)  # 20 MB: the writing lasts
    megatron = tmp_path / "whole" / "megatron"
    moments = random.Random(14)
    for command, origin, whole in (
        ("import", source, megatron),
        ("export", megatron, tmp_path / "whole" / "hf"),
    ):
        began = time.monotonic()
        assert conversions.run((command, origin, whole)) == [0]
        lasts, expected = time.monotonic() - began, content(whole)
        target = tmp_path / command / "out"
        killed = 0
        while killed < KILLS:
            began, moment = time.monotonic(), moments.uniform(0, lasts)
            (code,) = conversions.run((command, origin, target), kill_after=moment)
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                lasts = time.monotonic() - began
            killed += code != 0
            if target.exists():
                assert content(target) == expected
                shutil.rmtree(target)
        assert conversions.run((command, origin, target)) == [0]
        assert content(target) == expected
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_two_at_once(conversions: Conversions, small: Path, tmp_path: Path) -> None:
    """One is refused; what is there is the model of the one that was not."""
    other = llama(tmp_path / "other", 16, seed=1)
    for name, origin in (("one", small), ("two", other)):
        import_hugging_face(origin, tmp_path / name, 128)
    for number in range(5):
        target = tmp_path / str(number) / "out"
        target.parent.mkdir()
        codes = conversions.run(("import", small, target), ("import", other, target))
        assert sorted(codes) == [0, 2]
        winner = tmp_path / ("one" if codes[0] == 0 else "two")
        assert content(target) == content(winner)
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_while_another_writes(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        files.alone_at(target, "--save"),
        pytest.raises(UserError, match=r"^--save: another run on this machine is writing .*/out;"),
    ):
        import_hugging_face(small, target, 128)
    assert not list(tmp_path.iterdir())


def test_names_of_others(small: Path, tmp_path: Path) -> None:
    """Directories of the kind that this project once used, or that another run has, stay."""
    target = tmp_path / "out"
    others = [target.with_name("out.partial"), target.with_name("out.elsewhere-1.partial")]
    for other in others:
        other.mkdir()
        (other / "thesis.txt").write_text("precious")
    import_hugging_face(small, target, 128)
    assert all((other / "thesis.txt").read_text() == "precious" for other in others)
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_what_stands_in_the_way(small: Path, tmp_path: Path) -> None:
    """A file, a pipe, a link to something, a link where the unfinished directory would be."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("precious")
    target = tmp_path / "out"
    target.write_text("a file")
    refused("exists already", small, target)
    refused("cannot write", small, target / "below")
    target.unlink()
    os.mkfifo(target)
    refused("exists already", small, target)
    target.unlink()
    target.symlink_to(precious)
    refused("exists already", small, target)
    target.unlink()
    target.symlink_to(target)
    refused("exists already", small, target)
    target.unlink()
    files.temporary(target).symlink_to(precious)
    refused("cannot write", small, target)
    assert (precious / "thesis.txt").read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == sorted([precious, files.temporary(target)])


def refused(message: str, source: Path, target: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_hugging_face(source, target, 128)
    assert "\n" not in str(error.value) and str(target.parent) in str(error.value)


def test_a_link_stands_for_what_it_points_to(small: Path, tmp_path: Path) -> None:
    """To an empty directory, and to nothing yet, on what may be another disk."""
    disk = tmp_path / "disk"
    (disk / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(disk / name)
        import_hugging_face(small, link, 128)
        assert link.is_symlink() and (disk / name / "release" / ".metadata").is_file()
    assert sorted(path.name for path in disk.iterdir()) == ["empty", "new"]


@pytest.mark.parametrize("most", [10, 500, 50_000])
def test_full_disk(most: int, small: Path, tmp_path: Path) -> None:
    """Before, within and between tensors; the directories above, which are new, go as well."""
    megatron, hf = tmp_path / "megatron", tmp_path / "new" / "directory" / "hf"
    said = r"^cannot write {}: .*; nothing of it is kept$"
    with full_disk(most), pytest.raises(UserError, match=said.format(megatron)):
        import_hugging_face(small, megatron, 128)
    assert not list(tmp_path.iterdir())
    import_hugging_face(small, megatron, 128)
    with full_disk(most), pytest.raises(UserError, match=said.format(hf)):
        export_hugging_face(megatron / "release", hf, None, None, 10**9)
    assert list(tmp_path.iterdir()) == [megatron]


def test_scores(tmp_path: Path) -> None:
    """tools/evaluate.py's file: whole, beside what others have there."""
    output, other = tmp_path / "scores.json", tmp_path / "scores.json.partial"
    other.write_text("precious")
    write_scores(output, tmp_path, [])
    before = json.loads(output.read_text())
    assert before["scores"] == []
    with full_disk(5), pytest.raises(UserError, match=f"^cannot write {output}: "):
        write_scores(output, tmp_path / "another", [])
    assert json.loads(output.read_text()) == before
    assert other.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [output, other]


def test_full_disk_of_one_rank(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks end, one of them says why, and nothing is left."""
    script = str(SUPPORT / "convert_on_a_small_disk.py")
    target = tmp_path / "out" / "megatron"
    command = [script, "import", "--hf", str(small), "--save", str(target)]
    as_torchrun_does = tmp_path / "job" / "0" / "error.json"
    as_torchrun_does.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(as_torchrun_does))
    run = launch(2, command, tmp_path / "run", check=False, timeout=120, fresh_threads=1)
    assert run.codes == [2, 2]
    said = [line for output in run.outputs for line in output.splitlines() if "error: " in line]
    assert said == [f"error: cannot write {target}: File too large; nothing of it is kept"]
    assert "Traceback" not in "".join(run.outputs)
    assert not target.parent.exists()
