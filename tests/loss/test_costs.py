"""FLOPs, collectives and kept bytes are those of the table in chunked.py."""

from __future__ import annotations

from pathlib import Path

from launch import launch


def test_costs_are_as_stated(tmp_path: Path) -> None:
    run = launch(2, ["-m", "cost_ranks"], tmp_path)
    assert all("as stated" in output for output in run.outputs)
