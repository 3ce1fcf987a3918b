"""The pages that people read: their links, names, options, quoted errors and commands are real."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from launch import REPOSITORY, recipe_environment

PAGES = sorted(
    [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
        *REPOSITORY.glob("docs/*.md"),
        REPOSITORY / "tests/benchmarks/RESULTS.md",
    ]
)
ROOMS = ("megatron_slm", "tools", "examples", "tests", "docs")
# Programs whose options are not ours to check, and those that a page names of them.
OTHERS = set(
    """
    --nproc_per_node --help --no-build-isolation --cpus-per-task --cpu-bind --nodes
    --ntasks-per-node --gpus-per-node --check --exclusive --signal --requeue --open-mode --wrap
    --modelopt-enabled --logits_all
    """.split()
)
RUNS = ("megatron_slm.pretrain", "examples/your_own_pretrain.py")
JOBS = ("tools/score_reference.py", "tools/token_dynamics.py")  # beside training
OUTSIDE = ("tools/score_with_model.py", "tools/import_scores.py", "tools/evaluate.py")


def read(page: Path) -> str:
    return page.read_text()


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def quoted(page: Path) -> list[str]:
    """Return what stands in backticks in the prose."""
    return re.findall(r"`([^`]+)`", prose(page))


def shell_blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Each command of the page's shell blocks, on one line, without comments."""
    lines = "\n".join(shell_blocks(page)).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and line[0] != "#"]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    """To other pages, places in them, and pictures."""
    text = prose(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    assert "](http://" not in text


def test_every_page_is_reached() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", read(REPOSITORY / "README.md")))
    assert linked == {f"docs/{page.name}" for page in REPOSITORY.glob("docs/*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths(page: Path) -> None:
    """Files of the repository that are named, in prose and in commands, are there."""
    named = [word for text in quoted(page) for word in text.split()]
    named += [word for command in commands(page) for word in command.split()]
    for word in named:
        path = word.strip("'\"(),;").split(":")[0]
        if re.match(rf"({'|'.join(ROOMS)})/[\w./-]*$", path):
            assert (REPOSITORY / path).exists(), path
        elif re.fullmatch(r"[\w-]+\.(py|sh|sbatch)", path):
            found = next((f for room in ROOMS for f in (REPOSITORY / room).rglob(path)), None)
            assert found or (REPOSITORY / path).exists(), path
        elif re.fullmatch(r"megatron_slm(\.\w+)+", path):
            parts = (path, path.rpartition(".")[0])  # the last may be a name in the module
            modules = [REPOSITORY / part.replace(".", "/") for part in parts]
            assert any(one.with_suffix(".py").exists() or one.is_dir() for one in modules), path


@cache
def options_of_a_job(*command: str) -> set[str]:
    """Return the options that a job's own parser prints; for a run, Megatron's and ours."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=recipe_environment(1, PYTHONPATH=REPOSITORY, COLUMNS=100),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return options_in(done.stdout)


def options_of_a_run() -> set[str]:
    return options_of_a_job("-m", "megatron_slm.pretrain", "--help-megatron")


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*+(?!\.\.\.)", text))


@cache
def options_of(program: str, subcommand: str) -> set[str]:
    """Return a program's options: a job's from its parser, others' from what the file declares."""
    if program in RUNS:
        return options_of_a_run()
    if program in JOBS:
        if subcommand in ("inspect", "longppl", "classify"):
            return options_of_a_job(program, subcommand, "--help")
        return options_of_a_run() | options_of_a_job(program, "--help")
    if program in OUTSIDE:
        return options_of_a_job(program, "--help")
    if program.endswith(".sbatch") or "with_datatrove" in program:
        return declared_in(program) | declared_in("tools/preprocess_data.py")
    return declared_in(program)


def declared_in(file: str) -> set[str]:
    own = set(re.findall(r'"(--[a-z][\w-]*)"', read(REPOSITORY / file)))
    return own | {f"--no-{option[2:]}" for option in own}  # of BooleanOptionalAction


def test_options_of_commands() -> None:
    """Each command takes the options that it is given."""
    seen = 0
    for page in PAGES:
        for command in commands(page):
            words = command.split("|")[0].split()
            at = next((n for n, word in enumerate(words) if is_program(word)), None)
            if at is None:
                continue
            given = options_in(" ".join(words[at + 1 :]))
            unknown = given - options_of(words[at], " ".join(words[at + 1 : at + 2]))
            assert not unknown, (page.name, command, unknown)
            seen += 1
    assert seen > 20


def is_program(word: str) -> bool:
    path = r"(tools|examples|tests)/[\w/]+\.(py|sbatch)"
    return word == "megatron_slm.pretrain" or re.fullmatch(path, word) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_in_prose(page: Path) -> None:
    jobs = [options_of(job, "") for job in (*JOBS, *OUTSIDE)]
    rooms = ("tools", "examples", "tests/benchmarks")
    scripts = [script for room in rooms for script in (REPOSITORY / room).glob("*.py")]
    files = [declared_in(str(script.relative_to(REPOSITORY))) for script in scripts]
    known = OTHERS.union(*jobs, *files)
    for text in quoted(page):
        assert not options_in(text) - known, text


def messages() -> list[str]:
    """All strings of the package, with what varies as an ellipsis; of scripts their lines."""
    found = []
    for file in (REPOSITORY / "megatron_slm").rglob("*.py"):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    scripts = [*REPOSITORY.glob("tools/*.sh"), *REPOSITORY.glob("examples/*.sh")]
    return found + [line for script in scripts for line in read(script).splitlines()]


def test_quoted_errors() -> None:
    """Messages in the tables of troubleshooting.md are those of the code."""
    rows = re.findall(
        r"^\| `([^`]+)` \|", read(REPOSITORY / "docs/troubleshooting.md"), re.MULTILINE
    )
    assert len(rows) > 40
    everything = messages()
    for row in rows:
        parts = [re.escape(part) for part in row.split("…") if part.strip()]
        pattern = re.compile(".*?".join(parts))
        assert any(pattern.search(message) for message in everything), row


def test_refused_options_are_listed() -> None:
    """Those that training refuses for all runs, each with its reason."""
    refused = set()
    for name in ("arguments", "experts", "hybrid"):
        source = read(REPOSITORY / f"megatron_slm/training/command_line/{name}.py")
        table = re.search(r"^UNSUPPORTED = \{.*?^\}", source, re.DOTALL | re.MULTILINE)
        assert table is not None
        refused |= set(re.findall(r'"(--[\w-]+)"', table[0]))
    refused &= options_of_a_run()
    assert len(refused) > 14
    assert not refused - options_in(read(REPOSITORY / "docs/troubleshooting.md"))


def test_readme_is_short() -> None:
    assert len(read(REPOSITORY / "README.md").splitlines()) <= 150
    for picture in REPOSITORY.glob("docs/images/*"):
        assert picture.suffix == ".svg" and picture.stat().st_size < 100_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_can_be_pasted(page: Path) -> None:
    for block in shell_blocks(page):
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_dry_runs() -> None:
    """Commands that only print what would be started."""
    found = [line for page in PAGES for line in commands(page) if line.startswith("DRY_RUN=1")]
    assert found
    for line in found:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=REPOSITORY,
            env=os.environ,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "megatron_slm.pretrain" in shlex.split(done.stdout)
