"""Name the bytes that tokens stand for, as sentencepiece and byte-level BPE write them."""

from __future__ import annotations

import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token of sentencepiece that stands for one byte."""


def _byte_level() -> dict[str, int]:
    """Map GPT-2's characters to the bytes that they stand for: printable ones stand for themselves,
    and the others are numbered from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


BYTE_LEVEL = _byte_level()
