"""tools/environment.sh with a stand-in for pip, which says what it is asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from launch import REPOSITORY

PIP = """
import os, sys
if sys.argv[1] == "list":
    print("apex==0.1\\nnumpy==1.26.4\\ntorch==2.8.0a0+34c6371d24.nv25.8\\ntransformers==4.51")
    print("transformer_engine==2.5.0")
else:
    print("pip", *sys.argv[1:], "APEX_CUDA_EXT" in os.environ)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Modules of an image, empty, and a copy of what is installed, in root/."""
    for name in ("pip", "torch/distributed", "transformer_engine"):
        (tmp_path / "image" / name).mkdir(parents=True)
        (tmp_path / "image" / name.split("/")[0] / "__init__.py").touch()
    (tmp_path / "image" / "pip" / "__main__.py").write_text(PIP)
    ran = "import sys; print('ran', *sys.argv[1:])"
    (tmp_path / "image" / "torch" / "distributed" / "run.py").write_text(ran)
    (tmp_path / "root" / "tools").mkdir(parents=True)
    for name in ("setup.py", "tools/environment.sh"):
        shutil.copy(REPOSITORY / name, tmp_path / "root" / name)
    return tmp_path / "image"


def use(image: Path, command: str) -> subprocess.CompletedProcess[str]:
    root = image.with_name("root")
    path = f"{image.with_name('bin')}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-euc", f"source {root}/tools/environment.sh; use_environment {command}"],
        env={"PATH": path, "PYTHONPATH": str(image), "PYTHON": sys.executable},
        cwd=image.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_container_keeps_what_it_has(image: Path) -> None:
    root = image.with_name("root")
    done = use(image, "container; torchrun a 'b  c'")
    assert done.returncode == 0, done.stderr
    assert "include-system-site-packages = true" in (root / ".venv" / "pyvenv.cfg").read_text()
    pips = [line for line in done.stdout.splitlines() if line.startswith("pip ")]
    kept = root / ".venv" / "image.txt"
    asked = f"install --quiet --disable-pip-version-check --constraint {kept} --editable {root}"
    assert pips == [f"pip {asked} False"]
    assert [line.split("==")[0] for line in kept.read_text().splitlines()] == [
        *("apex", "torch", "transformer_engine")
    ]
    assert done.stdout.splitlines()[-1] == "ran a b  c"
    assert "pip " not in use(image, "container").stdout  # nothing to do


def test_elsewhere_it_is_refused(image: Path) -> None:
    (image / "transformer_engine").rename(image / "elsewhere")
    done = use(image, "container")
    assert done.returncode == 2
    assert "modules venv pip torch transformer_engine, and none of" in done.stderr
    (image / "elsewhere").rename(image / "transformer_engine")
    venv.create(image.with_name("root") / ".venv")
    done = use(image, "container")
    assert done.returncode == 2
    assert "remove it first" in done.stderr


@pytest.mark.parametrize("nvcc", [True, False])
def test_apex_is_built_where_there_is_a_compiler(image: Path, nvcc: bool) -> None:
    image.with_name("bin").mkdir()
    venv.create(image.with_name("root") / ".venv")  # and not with pip, which takes long
    if nvcc:
        (image.with_name("bin") / "nvcc").touch(0o755)
    done = use(image, "cuda")
    assert done.returncode == 0, done.stderr
    first, engine, *apex = [line for line in done.stdout.splitlines() if line.startswith("pip ")]
    root = image.with_name("root")
    assert first.endswith(f" --editable {root} ninja False")
    assert engine.endswith(f" --no-build-isolation --editable {root}[cuda] False")
    assert len(apex) == (nvcc or shutil.which("nvcc", path="/usr/bin:/bin") is not None)
    for line in apex:
        assert "--no-build-isolation git+https://github.com/NVIDIA/apex@" in line
        assert line.endswith(" True")
