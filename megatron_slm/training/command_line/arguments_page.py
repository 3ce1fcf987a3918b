"""Write docs/arguments.md, the tables of all options, from their declarations:

python -m megatron_slm.training.command_line.arguments_page > docs/arguments.md
"""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator
from typing import Any

from megatron_slm.training.command_line.first_check import DYNAMICS, HELP_MEGATRON, SCORING
from megatron_slm.training.command_line.needed import add_needed
from megatron_slm.training.command_line.option_groups import add_group
from megatron_slm.training.command_line.option_values import Named, Number
from megatron_slm.training.command_line.options import SelectiveOptions

HEAD = f"""\
# Arguments

`megatron_slm.pretrain` takes all arguments of Megatron's GPT pretraining and those of the first
table.  The second table lists the arguments of Megatron's that every run needs.  Two tools score
for a run: `tools/score_reference.py` and `tools/token_dynamics.py` take the run's arguments, and
those of "Score cache" and "Token dynamics" in addition.  `--help` prints the tables of a command,
`{HELP_MEGATRON}` all of Megatron's arguments as well.

This page is generated:
`python -m megatron_slm.training.command_line.arguments_page > docs/arguments.md`.
"""


def page() -> str:
    """Return the page, which has a section for each group of options in --help."""
    parser = ArgumentParser(add_help=False)
    add_group(parser, SelectiveOptions)
    add_needed(parser)
    for options in (*SCORING.options, *DYNAMICS.options):
        add_group(parser, options)
    return "\n".join([HEAD, *(line for group in parser._action_groups for line in _section(group))])


def _section(group: Any) -> Iterator[str]:
    """Yield the lines of a group's section; none of a group without options."""
    actions = [action for action in group._group_actions if action.help is not SUPPRESS]
    if not actions:
        return
    title: str = group.title
    yield f"## {title[0].upper()}{title[1:]}\n"
    if group.description:
        yield f"{group.description}\n"
    yield "| option | value | default | meaning |"
    yield "|---|---|---|---|"
    for action in actions:
        cells = (f"`{action.option_strings[0]}`", _value(action), _default(action), _help(action))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _value(action: Action) -> str:
    """Describe what an option accepts."""
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    said = f"`{action.metavar}{' ...' * (action.nargs is not None)}`"
    number = {int: "integer", float: "number"}.get(action.type)  # type: ignore[call-overload]
    if isinstance(action.type, Named):
        names = ", ".join(f"`{name}`" for name in action.type.names)
        return f"{names}, or `module:function`"
    if isinstance(action.type, Number):
        number = action.type.accepted
    return said if number is None else f"{said}: {number}"


def _default(action: Action) -> str:
    if action.required:
        return "must be given"
    if action.default in (None, []):
        return "none"
    if action.nargs == 0:
        return "off"
    return f"`{action.default}`"


def _help(action: Action) -> str:
    """Return the help text, with options as code, and without the default at its end."""
    text = (action.help or "").replace("%%", "%").partition(" Default: ")[0]
    return re.sub(r"(?<![\w`])--[a-z][a-z0-9-]*", r"`\g<0>`", text)


if __name__ == "__main__":
    print(page(), end="")
