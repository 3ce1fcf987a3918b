"""Event files of runs that were stopped, went back, began anew or diverged, and what a report says
of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_slm.analysis.event_files import read_events
from megatron_slm.analysis.report.curves import MOST_LINES, run_figures
from megatron_slm.analysis.report.facts import headline, run_facts
from megatron_slm.analysis.report.page import write_report
from megatron_slm.analysis.report.run_files import RunFiles, Series, read_run_files
from megatron_slm.analysis.report.settings import RunSettings
from megatron_slm.errors import UserError
from report_page import SETTINGS

LOSS = "all-token loss"


def write(directory: Path, number: int, steps: range, value: Callable[[int], float]) -> Path:
    """Write a loss over iterations, and over samples as Megatron does, to the number-th file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"events.out.tfevents.{number}"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for at in steps:
            for tag, step in ((f"{LOSS} vs samples", 1000 * at), (LOSS, at)):
                values = [Summary.Value(tag=tag, simple_value=value(at))]
                event = Event(step=step, summary=Summary(value=values))
                writer.write(event.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("again", "last"),
    [
        (range(81, 121), 120),  # resumed from its last checkpoint
        (range(41, 61), 60),  # went back to one before
        (range(1, 11), 10),  # began anew
        (range(100, 101), 100),  # had ended, and was validated once more
    ],
)
def test_what_later_files_undo(again: range, last: int, tmp_path: Path) -> None:
    write(tmp_path, 1, range(1, 101), lambda at: 5.0)
    with (tmp_path / "events.out.tfevents.1").open("ab") as file:
        values = [Summary.Value(tag="said once, later", simple_value=1.0)]
        content = Event(step=130, summary=Summary(value=values)).SerializeToString()
        RecordWriter(file).write(content)
    write(tmp_path, 2, again, lambda at: 2.0)
    expected = {at: 2.0 if at in again else 5.0 for at in range(1, last + 1)}
    assert read_events(tmp_path).scalars == {LOSS: expected}


@pytest.mark.parametrize("cut", [0, 9, 40])
def test_zeros_where_a_machine_stopped(cut: int, tmp_path: Path) -> None:
    """In place of the end of the last records, and after it."""
    path = write(tmp_path, 1, range(1, 11), float)
    os.truncate(path, path.stat().st_size - cut)
    os.truncate(path, path.stat().st_size + 5000)
    found = read_events(tmp_path).scalars[LOSS]
    assert list(found) == list(range(1, 11 if cut == 0 else 10))
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="damaged before byte"):
        read_events(tmp_path)


def test_a_run_that_diverged(tmp_path: Path) -> None:
    write(tmp_path, 1, range(1, 101), lambda at: math.nan if at > 60 else 2 + 1 / at)
    run = read_run_files(tmp_path)
    lost = "NaN or infinite from iteration 61 on"
    assert headline(run).endswith(f"to 2.017 nats a token at iteration 60; {lost}")
    assert dict(run_facts(run, None, True))["Loss at the end"] == f"all tokens 2.017 ({lost}) nats"
    (figure,) = run_figures(run, None)
    assert len(figure["lines"][0]["y"]) == 60


def test_a_loss_that_stays(tmp_path: Path) -> None:
    write(tmp_path, 1, range(1, 4), lambda at: 2.0)
    said = "Training loss begins and ends at 2.000 nats a token at iteration 3"
    assert headline(read_run_files(tmp_path)) == said


def test_a_directory_whose_name_is_not_text(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"run\xff")
    write(directory, 1, range(1, 4), lambda at: 2.0)
    write_report(directory, tmp_path / "report.html", None)
    assert "<title>run?: " in (tmp_path / "report.html").read_text()


def test_datasets_of_all_names_and_numbers() -> None:
    names = ["validation_text", "web", *(f"x{at}" for at in range(99))]
    others = ["validation", "validation-a b", "web validation-a", "validation ppl"]
    series = Series([1], [0.5])
    scalars = {f"selected ratio {name}": series for name in (*names, *others)}
    scalars |= {f"lm loss validation-{name}": series for name in names}
    losses, ratios = run_figures(RunFiles("run", Path(), scalars), None)
    shown = [line["name"] for line in ratios["lines"]]
    assert shown == sorted(names)[:MOST_LINES] and "validation_text" in shown
    assert ratios["note"] == "The first 36 of 101 datasets by name."
    assert len(losses["lines"]) == MOST_LINES - 1  # beside a loss of training
    assert losses["note"] == "The first 35 of 101 validation losses by name."


def test_parameters_of_a_llama_alone() -> None:
    assert RunSettings(SETTINGS).parameters is not None
    for name in ("multi_latent_attention", "mtp_num_layers", "num_experts"):
        assert RunSettings(SETTINGS | {name: "1" if "num" in name else "True"}).parameters is None
        assert RunSettings(SETTINGS | {name: "None"}).parameters is not None
