"""tools/plan.py on the recipes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from launch import REPOSITORY


def plan(recipe: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "plan.py")]
    return subprocess.run(
        [*command, str(REPOSITORY / "examples" / recipe), *more],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_recipe_fits_and_better_layouts_are_proposed() -> None:
    done = plan("pretrain_slm_70b.sh", "NODES=16", "--layouts", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert re.search(r"^parameters, billions +68\.977$", done.stdout, re.MULTILINE)
    found = [line for line in lines if re.match(r"TP\d", line)]
    assert "TP8 PP4 VP4 CP1 DP4 " in found[0]
    assert found[0].endswith("the recipe's")
    sizes = [float(line.split()[-4 if "recipe's" not in line else -6]) for line in found]
    assert all(size < 80 for size in sizes)
    seconds = [float(line.split()[-2]) for line in found[1:]]
    assert len(seconds) == 3
    assert seconds == sorted(seconds)
    # The parts of every stage add up.
    columns = [[float(x) for x in line.split()[1:]] for line in lines if line.startswith("  ")]
    for *parts, total in zip(*columns, strict=True):
        assert sum(parts) == pytest.approx(total, abs=0.04)


def test_refused() -> None:
    done = plan("pretrain_slm_70b.sh", "NODES=3")  # 24 ranks are no multiple of TP8 x PP4
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Megatron refuses the recipe's arguments")
    done = plan("no_such_recipe.sh")
    assert done.returncode == 2
    assert "no_such_recipe.sh failed" in done.stderr.splitlines()[-1]
