"""Layers that stream from the host: what is copied, on which stream, and who waits for it."""

from __future__ import annotations

from pathlib import Path

from launch import launch


def test_copies_run_beside_the_computation(tmp_path: Path) -> None:
    run = launch(1, ["-m", "streamed_layers"], tmp_path)
    assert "as expected" in run.outputs[0]
