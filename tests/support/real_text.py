"""Real text that every machine has: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path


def docstrings(modules: list[str]) -> list[str]:
    """Docstrings of the named modules and of all their functions and classes, in source order."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for module in modules:
        tree = ast.parse((library / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node)
                if text:
                    found.append(text)
    return found
