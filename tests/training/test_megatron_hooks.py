"""What the plug-in replaces of Megatron: in one file, once, and only what it was written for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import pytest

from launch import REPOSITORY
from megatron_slm.errors import UserError
from megatron_slm.training import megatron_hooks as hooks

# Stand-ins for what Megatron does on a GPU, which a machine with one never imports.
PLATFORM = {f"megatron_slm/cpu_platform/{name}.py" for name in ("checkpoints", "optimizer", "rng")}
HOOKS = "megatron_slm/training/megatron_hooks.py"
ALL = (*hooks.STEP, *hooks.CHECKPOINTS, *hooks.LOG, *hooks.DATA)
RUN = hooks.Run(
    run_step=lambda schedule, **arguments: ("first", schedule),
    before_save=lambda iteration: None,
    after_training=lambda iteration: None,
    timed=False,
    events=None,
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = [(resolve_name(hook.where), hook.name) for hook in ALL]
    values = [vars(owner)[name] for owner, name in before]
    yield
    for (owner, name), value in zip(before, values, strict=True):
        setattr(owner, name, value)


def test_one_file_replaces_what_is_megatrons() -> None:
    """Whatever is assigned to, or set, is not reached by a name that was imported from Megatron."""
    found = set()
    for path in (*REPOSITORY.glob("megatron_slm/**/*.py"), *REPOSITORY.glob("tools/*.py")):
        if _replaces_megatrons(ast.parse(path.read_text())):
            found.add(str(path.relative_to(REPOSITORY)))
    assert found == PLATFORM
    assert "setattr(resolve_name(hook.where), hook.name" in (REPOSITORY / HOOKS).read_text()


def test_the_check_sees_what_it_should() -> None:
    imported = "from megatron.training import training as t\nimport megatron.core\n"
    for line in ("t.train = f", "setattr(t, 'train', f)", "del t.train", "megatron.core.x.y = 1"):
        assert _replaces_megatrons(ast.parse(imported + line)), line
    for line in ("c = t.Class\nc.method = f", "t.a, t.b = f()", "vars(t)['train'] = f"):
        assert _replaces_megatrons(ast.parse(imported + line)), line
    assert not _replaces_megatrons(ast.parse(f"{imported}x.train = t.train\nargs.y = t.f()"))


def test_wrapped_once_for_the_last_run(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.training import training

    hooks.install_for_training(RUN)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("> wrapped in Megatron 0.19") and all(hook.name in line for hook in ALL)
    once = [getattr(resolve_name(hook.where), hook.name) for hook in ALL]
    hooks.install_for_training(hooks.Run(**vars(RUN) | {"run_step": lambda schedule: "second"}))
    hooks.install_for_scoring()
    assert [getattr(resolve_name(hook.where), hook.name) for hook in ALL] == once
    assert capsys.readouterr().out == ""
    assert training.get_forward_backward_func(pp_size=1, vp_size=None)() == "second"


@pytest.mark.parametrize(
    "changed",
    [
        lambda model, optimizer: None,
        lambda iteration, model, optimizer, opt_param_scheduler, flops, context: None,
        None,
    ],
)
def test_another_megatron_is_refused(changed: Any) -> None:
    """And nothing is wrapped."""
    from megatron.training import training

    training.save_checkpoint, schedule = changed, training.get_forward_backward_func
    with pytest.raises(
        UserError, match=r"save_checkpoint is .* in megatron-core 0\.19\.2, .*: install"
    ):
        hooks.install_for_training(RUN)
    assert training.get_forward_backward_func is schedule


def test_more_parameters_are_passed_on() -> None:
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda verbose=False: "compiled"
    hooks.install_for_scoring()
    assert utils.compile_helpers() is None
    utils.compile_helpers = lambda verbose: "compiled"
    with pytest.raises(
        UserError, match=r"is compile_helpers\(\) in .* and compile_helpers\(verbose\)"
    ):
        hooks.install_for_scoring()


def _replaces_megatrons(tree: ast.Module) -> bool:
    """Whether anything is assigned to what was imported from Megatron, or to a name for it."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {_bound(alias) for alias in node.names if alias.name.startswith("megatron.")}
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("megatron."):
            names |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):  # c = t.Class
        aliases = isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
        if aliases and _root(node.value) in names:
            names |= {at.id for at in node.targets if isinstance(at, ast.Name)}
    return any(_root(target) in names for node in ast.walk(tree) for target in _targets(node))


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _targets(node: ast.AST) -> list[ast.expr]:
    """Return the objects whose attributes a statement sets."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        return node.args[:1] if node.func.id in ("setattr", "delattr") else []
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    for target in list(targets):
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
    return [t.value for t in targets if isinstance(t, ast.Attribute | ast.Subscript)]


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and node.func.id == "vars" and node.args):
                return None
            node = node.args[0]
        else:
            node = node.value
    return node.id if isinstance(node, ast.Name) else None
