"""The rooms of the package: who may import whom, and what has which name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter

import pytest

from launch import REPOSITORY

PACKAGE = REPOSITORY / "megatron_slm"
MOST_LINES = 320
# Each may use those above it; rooms of a line do not know each other.
ROOMS = """
    errors
    files kernels parser
    selection
    loss model data cpu_platform
    reference
    training
    entry
    selective
    pretrain
    corpus planning
    analysis
    jobs
"""
SUBROOMS = {
    "corpus": "file_names progress | reading | tokenizers | indexed | cleaning | preprocessing"
    " | mixing",
    "analysis": "event_files token_text inspect_cache long_perplexity"
    " | dynamics evaluation | experiments | report",
}
# One thing in two rooms: what starts a job, what installs itself, what calls kernels once, and what
# is told again where torch is not imported yet.
SHARED_NAMES = (
    "main install try_out add_arguments TRACKER Score Scope Weighting NEED_REFERENCE".split()
)


def modules() -> dict[str, ast.Module]:
    """Every module by its name without the package's."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): (
            ast.parse(path.read_text())
        )
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


MODULES = modules()


@cache
def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(MODULES[name]):
        named: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        for each in named:
            own = each.removeprefix("megatron_slm.")
            if own != each:
                found.add(own if own in MODULES else own.rpartition(".")[0])
    return found - {name, ""}


def levels(rooms: str, split: str) -> dict[str, int]:
    """Return the number of the line that each room is on."""
    lines = [line.split() for line in rooms.strip().split(split)]
    return {room: level for level, line in enumerate(lines) for room in line}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def wrong_way(order: dict[str, int], edges: Iterator[tuple[str, str, str, str]]) -> list[str]:
    """Return the imports from a room that is not above the importing one."""
    return [
        f"{module} imports {target}"
        for module, room, target, other in edges
        if room != other and order[room] <= order[other]
    ]


def test_dependencies_point_downwards() -> None:
    order = levels(ROOMS, "\n")
    assert {room_of(module) for module in MODULES} <= order.keys()
    edges = (
        (module, room_of(module), target, room_of(target))
        for module in MODULES
        for target in imports(module)
    )
    assert not wrong_way(order, edges)


@pytest.mark.parametrize("room", SUBROOMS)
def test_stages_use_those_before_them(room: str) -> None:
    order = levels(SUBROOMS[room], "|")
    edges = (
        (module, module.split(".")[1], target, target.split(".")[1])
        for module in MODULES
        for target in imports(module)
        if module.startswith(f"{room}.") and target.startswith(f"{room}.")
    )
    assert not wrong_way(order, edges)


def test_only_the_wing_converts_models() -> None:
    wing = levels(ROOMS, "\n")["corpus"]
    order = levels(ROOMS, "\n")
    found = [
        module
        for module in MODULES
        if not module.startswith("model.conversion") and order[room_of(module)] < wing
        for target in imports(module)
        if target.startswith("model.conversion")
    ]
    assert not found


def test_no_circle() -> None:
    # Raises CycleError, which names one.
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_no_name_means_two_things_in_two_rooms() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, tree in MODULES.items():
        for name in public_names(tree):
            rooms[name].add(room_of(module))
    assert not {
        name: found for name, found in rooms.items() if len(found) > 1 and name not in SHARED_NAMES
    }


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        names: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [ast.Name(node.name)]
        elif isinstance(node, ast.Assign):
            names = node.targets
        elif isinstance(node, ast.AnnAssign):
            names = [node.target]
        for name in names:
            if isinstance(name, ast.Name) and not name.id.startswith("_"):
                yield name.id


@pytest.mark.parametrize("folder", ["megatron_slm", "tools"])
def test_files_are_read_in_one_sitting(folder: str) -> None:
    files = [*(REPOSITORY / folder).rglob("*.py"), *(REPOSITORY / folder).rglob("*.js")]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert not {
        path.relative_to(REPOSITORY).as_posix(): lines
        for path, lines in lengths.items()
        if lines > MOST_LINES
    }


def test_the_package_runs_no_file_of_tools() -> None:
    """It names them in what it tells people, and nowhere as a path."""
    a_path = re.compile(r"tools|(\S*/)?tools/\S*")
    found = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and a_path.fullmatch(node.value)
    ]
    assert not found
