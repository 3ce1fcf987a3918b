"""The token map's data: text, losses and selection of every token at every dump, for a page.

Losses are rounded to a thousandth of a nat in 16 bits, selection is a bit a token, both base64:
50,000 tokens at 25 iterations take 4 MB.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.token_text import token_texts
from megatron_slm.data.token_dump import TokenDump
from megatron_slm.data.tokenizer import TokenizerFile

MOST_TOKENS, MOST_DUMPS = 1 << 16, 25
STEPS = 1000  # of a nat


def token_map(
    dumps: list[TokenDump], tokenizer: TokenizerFile | None, most_tokens: int = MOST_TOKENS
) -> dict[str, Any]:
    """What token_map.js draws; of many samples the first, of many dumps some, evenly spread.

    pieces: the different texts.  ids: uint16 or uint32 [n, s + 1], each token's piece.
    losses, reference: uint16 [n, s] for each dump, in 1/1000 nat; one reference if it is the same
    in all.  selected: a bit a token for each dump.  valid: a bit a token.
    """
    shown = [dumps[at] for at in _spread(len(dumps))]
    first = shown[0]
    length = first.losses.shape[1]
    count = max(1, min(len(first.losses), most_tokens // length))
    unique, ids = np.unique(first.tokens[:count], return_inverse=True)
    reference = [dump.reference_losses for dump in shown if dump.reference_losses is not None]
    if reference and all(np.array_equal(each, reference[0]) for each in reference):
        reference = reference[:1]
    names = first.about.get("domains") or [None] * count
    return {
        "length": length,
        "count": count,
        "left_out": len(first.losses) - count,
        "iterations": [dump.iteration for dump in shown],
        "pieces": token_texts(tokenizer, unique.tolist()),
        "wide": len(unique) > np.iinfo(np.uint16).max,
        "ids": _pack(ids.astype("<u4" if len(unique) > np.iinfo(np.uint16).max else "<u2")),
        "losses": [_pack(_rounded(dump.losses[:count])) for dump in shown],
        "reference": [_pack(_rounded(each[:count])) for each in reference],
        "selected": [
            _pack(_bits(dump.selected[:count])) for dump in shown if dump.selected is not None
        ],
        "valid": _pack(_bits(first.valid[:count])),
        "titles": [
            f"Sample {number}" + (f", {name}" if name else "")
            for number, name in zip(first.samples[:count].tolist(), names, strict=False)
        ],
        "scale": _scale(shown, count),
    }


def _spread(count: int) -> list[int]:
    """At most MOST_DUMPS of `count` positions, with the first and the last."""
    wanted = np.linspace(0, count - 1, min(count, MOST_DUMPS))
    return sorted({round(at) for at in wanted.tolist()})


def _scale(dumps: list[TokenDump], count: int) -> float:
    """Nats at which the shading is full, a multiple of 1/2: few tokens are beyond."""
    values = []
    for dump in dumps:
        known = dump.reference_losses
        shaded = dump.losses if known is None else dump.losses - known
        values.append(np.abs(shaded[:count][dump.valid[:count]]))
    joined = np.concatenate(values)
    joined = joined[np.isfinite(joined)]
    return max(0.5, round(float(np.quantile(joined, 0.95)) * 2) / 2) if len(joined) else 0.5


def _rounded(losses: NDArray[np.float32]) -> NDArray[np.uint16]:
    steps = np.rint(np.nan_to_num(losses, nan=np.inf) * float(STEPS))
    return np.clip(steps, 0, np.iinfo(np.uint16).max).astype("<u2")


def _bits(flags: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.packbits(flags, bitorder="little")


def _pack(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
