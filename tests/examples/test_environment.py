"""tools/environment.sh with a stand-in for pip, which says what it is asked for."""

from __future__ import annotations

import shlex
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
    (pathlib.Path(__file__).parents[2] / "headers").write_text(os.environ.get("CPATH", ""))
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
    """Return what pip was asked to install since the last call, and whether for Apex."""
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
    options = "--no-compile --disable-pip-version-check"
    wanted = f"install {options} --constraint {kept} --editable {root}"
    assert asked(image) == [f"pip {wanted} False"]
    assert [line.split("==")[0] for line in kept.read_text().splitlines()] == [
        *("apex", "torch", "transformer_engine")
    ]
    assert done.stdout.splitlines()[-1] == "ran a b  c"
    use(image, "container")
    assert not asked(image)  # nothing to do


def test_a_container_is_built_from_what_is_here(image: Path) -> None:
    """Each file that the Dockerfile copies exists, and what it runs when it has copied them makes
    the environment that it puts on the PATH."""
    lines = (REPOSITORY / "examples" / "docker" / "Dockerfile").read_text().splitlines()
    root = image.with_name("root")
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *sources, target = shlex.split(rest)
            assert all((REPOSITORY / source).exists() for source in sources), line
            assert target in ("./", *sources)
        if word == "RUN":
            command = shlex.split(rest)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(image), "PYTHON": sys.executable}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    assert (root / ".venv" / "bin" / "torchrun").exists()
    assert "PATH=/opt/megatron-slm/.venv/bin" in lines[-1]


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


@pytest.fixture
def builder(image: Path) -> dict[str, str]:
    """Variables of a machine with a compiler, CUDA's headers, nvcc and git, and with nothing else
    on its PATH than what a shell script needs."""
    venv.create(image.with_name("root") / ".venv")  # and not with pip, which takes long
    tools = image.with_name("bin")
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "cut", "dirname", "grep", "readlink", "tail", "tee"):
        (tools / name).symlink_to(shutil.which(name) or name)
    for name in ("c++", "git", "nvcc"):
        (tools / name).touch(0o755)
    header = image.with_name("cuda") / "include" / "crt" / "host_defines.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return {"PATH": str(tools), "CUDA_HOME": str(image.with_name("cuda"))}


@pytest.mark.parametrize("apex", ["", "apex"])
def test_apex_is_an_option(image: Path, builder: dict[str, str], apex: str) -> None:
    done = use(image, f"cuda {apex}", **builder)
    assert done.returncode == 0, done.stderr
    first, engine, *apexes = asked(image)
    root = image.with_name("root")
    assert first.endswith(f" --editable {root} ninja packaging pybind11 setuptools wheel False")
    assert engine.endswith(f" --no-build-isolation --editable {root}[cuda] False")
    assert len(apexes) == (apex == "apex")
    for line in apexes:
        assert "--no-build-isolation git+https://github.com/NVIDIA/apex@" in line
        assert line.endswith(" True")
    use(image, f"cuda {apex}", **builder)
    assert not asked(image)  # nothing to do


def test_the_compiler_is_told_of_the_headers(image: Path, builder: dict[str, str]) -> None:
    """Those of CUDA_HOME, or else of the toolkit that nvcc is of, before those it knows."""
    headers = str(image.with_name("cuda") / "include")
    use(image, "cuda", **builder | {"CPATH": "/more"})
    assert image.with_name("headers").read_text() == f"{headers}:/more"
    nvcc = image.with_name("cuda") / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    (image.with_name("bin") / "nvcc").unlink()
    (image.with_name("bin") / "nvcc").symlink_to(nvcc)
    done = use(image, "cuda; _cuda_headers", **builder | {"CUDA_HOME": ""})
    assert done.stdout.splitlines()[-1] == headers


@pytest.mark.parametrize(
    ("lacks", "apex", "package"),
    [
        ("c++", "", "apt install g++"),
        ("headers", "", "apt install cuda-crt-13-0"),
        ("git", "apex", "apt install git"),
        ("nvcc", "apex", "apt install cuda-nvcc-13-0"),
    ],
)
def test_what_cannot_be_built_is_said_first(
    image: Path, builder: dict[str, str], lacks: str, apex: str, package: str
) -> None:
    if lacks == "headers":
        shutil.rmtree(image.with_name("cuda"))
    else:
        (image.with_name("bin") / lacks).unlink()
    done = use(image, f"cuda {apex}", **builder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Transformer Engine cannot be built here without ")
    assert package in done.stderr and done.stderr.count("apt install") == 1
    assert not asked(image)
    if apex:  # Transformer Engine alone needs neither
        assert use(image, "cuda", **builder).returncode == 0


@pytest.fixture
def nowhere(image: Path) -> Path:
    """Return the image without torch, on a machine that seems to have no GPU."""
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
