"""No room for an output: one line names the file, and what stood there stays as it was."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import Checkpoints, Corpus
from launch import pretrain
from megatron_slm.analysis.dynamics.write_dynamics import write_dynamics
from megatron_slm.analysis.experiments.tasks import write_json
from megatron_slm.analysis.inspect_cache import inspect
from megatron_slm.analysis.report.page import write_report
from megatron_slm.data.manifest_types import ScoredData
from megatron_slm.data.score_cache import write_shard
from megatron_slm.data.score_manifest import CacheManifest
from megatron_slm.data.token_dump import read_dump, write_dump
from megatron_slm.errors import UserError
from report_page import write_run
from small_disk import full_disk, small_disk

ROOM = 4096  # bytes of a file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    write_run(directory, samples=4, length=512)
    return directory


def _report(run: Path) -> None:
    write_report(run, run / "report.html", None)


def _dynamics(run: Path) -> None:
    write_dynamics(run / "dump", run / "dynamics", None)


def _dump(run: Path) -> None:
    write_dump(run / "dump", read_dump(run / "dump" / "iter_0000010.safetensors"))


def _cache(run: Path) -> None:
    source = ScoredData("t", 9, {}, blends={})
    manifest = CacheManifest("sample", "float32", 2048, 1, {"train": 1}, source, {})
    manifest.write(run / "cache")
    ones = np.ones((1, 2048), np.float32)
    labels = np.ones((1, 2048), np.int32)
    write_shard(run / "cache", manifest, "train", 0, ones, labels, np.zeros(1, np.int64))


def _plot(run: Path) -> None:
    inspect([str(run / "cache"), "--plot", str(run / "plot.svg")])


def _results(run: Path) -> None:
    write_json(run / "results", {"curve": list(range(2000))})


WRITERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "report": (_report, "report.html"),
    "token dynamics": (_dynamics, "token_dynamics.parquet"),
    "token dump": (_dump, "iter_0000010.safetensors"),
    "score cache": (_cache, "00000.losses"),
    "plot of a score cache": (_plot, "plot.svg"),
    "results": (_results, "results"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_stood_there_stays(kind: str, run: Path) -> None:
    write, name = WRITERS[kind]
    write(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = f"cannot write .*/{name}: File too large"
    with full_disk(ROOM), pytest.raises(UserError, match=said) as error:
        write(run)
    assert "\n" not in str(error.value)
    assert ("the same command goes on" in str(error.value)) == (kind == "score cache")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "24K") as directory:
        yield directory


def test_training_goes_on(corpus: Corpus, untied: Checkpoints, disk: Path, tmp_path: Path) -> None:
    """What is there to be looked at does not end a run, and the checkpoint after it is whole."""
    logs = f"--tensorboard-dir {disk}/logs --slm-dump-dir {disk}/dump --slm-dump-interval 1"
    saved = tmp_path / "saved"
    arguments = [*corpus.arguments, *untied.without_reference, *logs.split()]
    arguments += f"--train-iters 4 --micro-batch-size 3 --save {saved} --save-interval 4".split()
    done = pretrain(1, arguments, tmp_path / "run")
    (output,) = done.outputs
    assert "Traceback" not in output and "error: " not in output
    (of_logs,) = [line for line in output.splitlines() if "TensorBoard's events" in line]
    assert of_logs.startswith(f"WARNING: cannot write to {disk}/logs: No space left on device; ")
    left_out = [line for line in output.splitlines() if "without this token dump" in line]
    assert left_out and all("No space left on device" in line for line in left_out)
    dumps = sorted((disk / "dump").iterdir())
    assert len(dumps) + len(left_out) == 5
    assert [read_dump(path).iteration for path in dumps] == list(range(len(dumps)))
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_nowhere_to_write_from_the_start(tmp_path: Path) -> None:
    """Found before the first step."""
    from megatron_slm.training import event_writer
    from megatron_slm.training.dump import token_dumps

    (tmp_path / "file").write_text("")
    wanted: Any = Namespace(slm_dump_interval=1, slm_dump_dir=str(tmp_path / "file" / "dump"))
    with pytest.raises(UserError, match=r"--slm-dump-dir .*/file/dump: Not a directory"):
        token_dumps(wanted, *[None] * 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--tensorboard-dir .*/file: File exists"):
        event_writer.check_directory(str(tmp_path / "file"))
