"""Parse command lines, and report a fault in one line that names the option perhaps meant."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from megatron_slm.errors import UserError

_UNKNOWN = "unrecognized arguments: "


class Parser(ArgumentParser):
    """An ArgumentParser that takes no abbreviations and raises UserError instead of exiting."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        refuse(self, message)


def refuse(parser: ArgumentParser, message: str) -> NoReturn:
    """Raise a parser's error message, which argparse would print below all options and exit.

    Raises:
        UserError: always.
    """
    if message.startswith(_UNKNOWN):
        words = message.removeprefix(_UNKNOWN).split()
        raise UserError(f"{message}{_meant(words, parser._option_string_actions)}")
    # Messages of our own types continue the option's name to a sentence.
    raise UserError(re.sub(r"^argument (\S+): (?!invalid|expected|not allowed)", r"\1 ", message))


def _meant(words: Iterable[str], options: Iterable[str]) -> str:
    """Suggest the options that unknown words resemble; nothing if there are none."""
    known = {option.lstrip("-"): option for option in options}
    meant = dict[str, None]()
    for word in words:
        if word.startswith("-"):
            name = word.partition("=")[0].lstrip("-").lower().replace("_", "-")
            meant |= {known[close]: None for close in get_close_matches(name, known, 1)}
    return f"; did you mean {' and '.join(meant)}?" if meant else ""
