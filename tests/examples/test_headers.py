"""What scripts of examples/ say of their variables, against what they do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "examples").glob("*.sh"))
RECIPES = [script for script in SCRIPTS if "\nslm_recipe=" in script.read_text()]
LAUNCHER = REPOSITORY / "examples" / "launch.sh"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_variables(recipe: Path) -> None:
    """All that have a default, in the recipe and in what it sources, and that default."""
    script = f"DRY_RUN=1; set -x; source {recipe} > /dev/null; set +x; (set -o posix; set)"
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    sourced = {Path(name) for name in re.findall(r"\+ source (\S+)", done.stderr)}
    assert {recipe, LAUNCHER} <= sourced
    header = recipe.read_text().partition("\nset -e")[0]
    for file in sourced - {LAUNCHER}:
        for name in re.findall(r"\$\{([A-Z_]+):=", file.read_text()):
            assert re.search(rf"^#   {name} ", header, re.MULTILINE), (file.name, name)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    said = dict(re.findall(r"^#   ([A-Z_]+) +(\S+): ", header, re.MULTILINE))
    for name, value in said.items():
        default = "".join(shlex.split(found[name])) or "none"
        assert value.replace("SIZE", found.get("SIZE", "")) == default, name


def test_the_launcher_names_its_variables() -> None:
    header, code = LAUNCHER.read_text().split("\n\n", 1)
    for name in re.findall(r"\$\{([A-Z_]+):=|^export ([A-Z_]+)=", code, re.MULTILINE):
        assert re.search(rf"\b{''.join(name)}\b", header), name
