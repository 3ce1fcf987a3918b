"""tools/environment.sh with a stand-in for pip, which says what it is asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pip
import pytest

from launch import REPOSITORY

PIP = """
import os, pathlib, sys, time
if sys.argv[1] == "list":
    print("apex==0.1\\nnumpy==1.26.4\\ntorch==2.8.0a0+34c6371d24.nv25.8\\ntransformers==4.51")
    print("transformer_engine==2.5.0")
elif sys.argv[1] == "index":
    print("Available versions:", os.environ["OFFERED"])
else:
    with (pathlib.Path(__file__).parents[2] / "asked").open("a") as asked:
        print("pip", *sys.argv[1:], "APEX_CUDA_EXT" in os.environ, file=asked)
    print("Collecting one\\nCollecting two\\n  Downloading two-1.0.whl (900.1 MB)", flush=True)
    time.sleep(float(os.environ.get("TAKES", "0")))
    if os.environ.get("FAILS", "none") in sys.argv:
        sys.exit("ERROR: no space left")
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


def use(image: Path, command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run it with what pip offers, how long it takes and with which argument it fails."""
    root = image.with_name("root")
    path = f"{image.with_name('bin')}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-euc", f"source {root}/tools/environment.sh; use_environment {command}"],
        env={"PATH": path, "PYTHONPATH": str(image), "PYTHON": sys.executable} | more,
        cwd=image.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def asked(image: Path) -> list[str]:
    """What pip was asked to install, and whether for Apex; no more of what was asked before."""
    file = image.with_name("asked")
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_a_container_keeps_what_it_has(image: Path) -> None:
    root = image.with_name("root")
    done = use(image, "container; torchrun a 'b  c'")
    assert done.returncode == 0, done.stderr
    assert "include-system-site-packages = true" in (root / ".venv" / "pyvenv.cfg").read_text()
    kept = root / ".venv" / "image.txt"
    wanted = f"install --disable-pip-version-check --constraint {kept} --editable {root}"
    assert asked(image) == [f"pip {wanted} False"]
    assert [line.split("==")[0] for line in kept.read_text().splitlines()] == [
        *("apex", "torch", "transformer_engine")
    ]
    assert done.stdout.splitlines()[-1] == "ran a b  c"
    use(image, "container")
    assert not asked(image)  # nothing to do


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
    first, engine, *apex = asked(image)
    root = image.with_name("root")
    assert first.endswith(f" --editable {root} ninja False")
    assert engine.endswith(f" --no-build-isolation --editable {root}[cuda] False")
    assert len(apex) == (nvcc or shutil.which("nvcc", path="/usr/bin:/bin") is not None)
    for line in apex:
        assert "--no-build-isolation git+https://github.com/NVIDIA/apex@" in line
        assert line.endswith(" True")


@pytest.fixture
def nowhere(image: Path) -> Path:
    """The image without torch, on a machine that looks as if it had no GPU."""
    shutil.rmtree(image / "torch")
    venv.create(image.with_name("root") / ".venv")
    # pip's own reading of versions, which the stand-in has not.
    real = Path(pip.__file__).parent
    (image / "pip" / "_vendor").symlink_to(real / "_vendor")
    (image.with_name("root") / "setup.py").write_text('x = ["torch>=2.11,<2.16", "torchx"]')
    return image


@pytest.mark.skipif(
    Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists(), reason="there is a GPU here"
)
@pytest.mark.parametrize(
    ("offered", "torch"),
    [
        ("2.17.0+cpu, 2.15.0+cu130, 2.15.0, 2.14.1+cpu, 2.13.0+cpu, 2.15.0+cpu.x", "2.14.1+cpu"),
        ("2.10.0+cpu, 2.15.0", None),
        ("2.15.0, 2.14.1", None),
        ("", None),
    ],
)
def test_a_torch_for_the_cpu(nowhere: Path, offered: str, torch: str | None) -> None:
    """Of those offered the newest that setup.py takes; without any all is as it was."""
    done = use(nowhere, "analysis", OFFERED=offered)
    assert done.returncode == 0, done.stderr
    installed = [line.split("version-check ")[1] for line in asked(nowhere)]
    whole = f"--editable {nowhere.with_name('root')}[analysis] False"
    assert installed == ([] if torch is None else [f"torch=={torch} False"]) + [whole]
    assert ("5 GB" in done.stdout) == (torch is None)


def test_an_installation_tells(nowhere: Path) -> None:
    """What could not be installed, in pip's words; a torch for the CPU is no condition."""
    done = use(nowhere, "dev", OFFERED="2.14.1+cpu", FAILS="torch==2.14.1+cpu")
    assert done.returncode == 0 and "ERROR: no space left" in done.stderr
    assert len(asked(nowhere)) == 2
    root = nowhere.with_name("root")
    done = use(nowhere, "other", OFFERED="", FAILS=f"{root}[other]")
    assert done.returncode == 1 and "ERROR: no space left" in done.stderr
    assert f"error: pip could not install all of this; {root}/.venv/install.log has" in done.stderr
    # On a terminal what pip is at, as it goes.
    command = f"source {root}/tools/environment.sh; use_environment third"
    done = subprocess.run(
        ["script", "-qec", f"bash -euc '{command}'", "/dev/null"],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(nowhere),
            "OFFERED": "",
            "TAKES": "2",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "package 2: Downloading two-1.0.whl (900.1 MB)" in done.stdout
