"""Command-line options from dataclasses: a field is an option, its docstring the help.

    slm_token_ratio: Annotated[Ratio, "K"] = 1.0
    \"\"\"Fraction of the tokens to train on.\"\"\"

becomes --slm-token-ratio K.  The annotation says what the option accepts: bool is a switch, Literal
a choice, and list several values; Annotated adds the function that converts a value, and the name
that --help gives it.  A field without a default is a required option.

Megatron's ArgumentGroupFactory reads its dataclasses in the same way, but imports torch, for which
--help does not wait.
"""

from __future__ import annotations

import ast
import inspect
from argparse import ArgumentParser
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


def add_group(parser: ArgumentParser, options: type[Any]) -> None:
    """Declare the options of a dataclass, as a group under its TITLE and docstring."""
    group = parser.add_argument_group(options.TITLE, inspect.getdoc(options))
    hints = get_type_hints(options, include_extras=True)
    helps = _docstrings(options)
    for field in fields(options):
        flag = f"--{field.name.replace('_', '-')}"
        group.add_argument(flag, **_settings(field, hints[field.name], helps[field.name]))


def _settings(field: Field[Any], hint: Any, text: str) -> dict[str, Any]:
    """Return what argparse is to know of an option."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is not False and default not in (MISSING, None, []):
        shown = f"{default:g}" if isinstance(default, float) else default
        text = f"{text} Default: {shown}."
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if default is MISSING:
        settings["required"] = True
    else:
        settings["default"] = default
    kind, extras = _unwrapped(hint)
    if kind is bool:
        return settings | {"action": "store_true"}
    if get_origin(kind) is list:
        settings["nargs"] = "+"
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return settings | {"choices": get_args(kind)}
    convert = [extra for extra in extras if callable(extra)]
    (metavar,) = (extra for extra in extras if isinstance(extra, str))
    return settings | {"type": convert[0] if convert else kind, "metavar": metavar}


def _unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """Take a type out of Annotated and of `| None`, and return what it was annotated with."""
    if get_origin(hint) is Annotated:
        kind, extras = _unwrapped(hint.__origin__)
        return kind, [*extras, *hint.__metadata__]
    if isinstance(hint, UnionType) or NoneType in get_args(hint):
        return _unwrapped(next(each for each in get_args(hint) if each is not NoneType))
    return hint, []


def _docstrings(options: type[Any]) -> dict[str, str]:
    """Return the docstring under each field, in one line; Python keeps them in the source alone."""
    (body,) = ast.parse(inspect.getsource(options)).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }
