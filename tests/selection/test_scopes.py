"""Ranks that share a scope select as one rank would, within the bound on traffic."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import launch


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_select_as_one(ranks: int, tmp_path: Path) -> None:
    run = launch(ranks, ["-m", "scope_ranks"], tmp_path)
    assert all("agreed" in output for output in run.outputs)
