"""More than a hundred ways in which a file that analysis reads can be bad: one line that says which
file and what about it, in bounded memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from launch import PYTHONPATH, SUPPORT
from malformed import GOOD, GROUPS

NAMES = [
    (f"{read.__name__}: {name}", part)
    for read, cases in GROUPS
    for name, (_, part) in cases.items()
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("malformed")
    command = [sys.executable, str(SUPPORT / "malformed.py"), str(directory)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read: dict[str, str] = json.loads((directory / "said.json").read_text())
    return read


@pytest.mark.parametrize(("name", "part"), NAMES, ids=[name for name, _ in NAMES])
def test_one_line_says_what_is_wrong(said: dict[str, str], name: str, part: str) -> None:
    assert said[name].startswith("error: ") and "\n" not in said[name]
    assert part in said[name]


def test_whole_files_are_read(said: dict[str, str]) -> None:
    assert {said[f"good {at}"] for at in range(len(GOOD))} == {"accepted"}
