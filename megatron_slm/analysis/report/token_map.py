"""Pack the token map's data for a page: each token's text, loss and selection at every dump.

Losses are rounded to a thousandth of a nat in 16 bits, selection takes one bit a token, and both
are base64.  All maps of a page share BYTES_OF_MAPS; each shows as many iterations, samples and
tokens as fit in its share.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_slm.analysis.report.settings import RunSettings
from megatron_slm.analysis.token_text import token_texts
from megatron_slm.corpus.tokenizers.tokenizer_file import TokenizerFile
from megatron_slm.data.token_dump import TokenDump

BYTES_OF_MAPS = 750_000  # before base64
MOST_TOKENS, MOST_DUMPS = 1 << 16, 25
LEAST_TOKENS, LEAST_DUMPS = 1 << 11, 3  # iterations are dropped before tokens are
STEPS_PER_NAT = 1000


def token_map(
    dumps: list[TokenDump], tokenizer: TokenizerFile | None, settings: RunSettings, maps: int = 1
) -> dict[str, Any]:
    """Return what token_map.js draws: the first n samples, cut to s tokens each, at evenly spread
    dumps.

    Args:
        dumps: the run's dumps.
        tokenizer: tokenizer that gives tokens their texts; None to show their ids.
        settings: the run's arguments, for the names of its datasets.
        maps: number of maps that share the page's room.

    Returns:
        Among others
            pieces: the distinct texts of tokens.
            ids: uint16 or uint32 [n, s + 1], the index of each token's text in pieces.
            losses: for each dump uint16 [n, s], in 1/1000 nat.
            reference: the same for the reference; a single entry if it never changes.
            selected: for each dump [n, s], one bit a token.
            valid: [n, s], one bit a token.
            begins: [n, s], one bit a token, set for the first of a document; empty where documents
                see each other.
            opens: index of the dump that is shown first.
            scale: nats at which the shading is strongest.
    """
    room = BYTES_OF_MAPS // maps
    shown = _spread(dumps, max(LEAST_DUMPS, room // (4 * LEAST_TOKENS)))
    reference = [dump.reference_losses for dump in shown if dump.reference_losses is not None]
    if reference and all(np.array_equal(each, reference[0]) for each in reference):
        reference = reference[:1]
    begins = shown[0].begins()
    bits = 17 * len(shown) + 16 * len(reference) + 17  # of a token: its losses, flags and id
    bits += begins is not None
    tokens = min(MOST_TOKENS, 8 * room // bits)
    length = min(shown[0].losses.shape[1], tokens)
    count = max(1, min(len(shown[0].losses), tokens // length))
    cut = np.s_[:count, :length]
    first = shown[0]
    unique, ids = np.unique(first.tokens[:count, : length + 1], return_inverse=True)
    names = first.about.domains or [""] * count
    opens = _opens(shown, count, length)
    return {
        "length": length,
        "count": count,
        "data": _data(first, settings),
        "left_out": [len(first.losses) - count, first.losses.shape[1] - length],
        "iterations": [dump.iteration for dump in shown],
        "opens": opens,
        "pieces": token_texts(tokenizer, unique.tolist()),
        "wide": len(unique) > np.iinfo(np.uint16).max,
        "ids": _pack(ids.astype("<u4" if len(unique) > np.iinfo(np.uint16).max else "<u2")),
        "losses": [_pack(_rounded(dump.losses[cut])) for dump in shown],
        "reference": [_pack(_rounded(each[cut])) for each in reference],
        "selected": [
            _pack(_bits(dump.selected[cut])) for dump in shown if dump.selected is not None
        ],
        "valid": _pack(_bits(first.valid[cut])),
        "begins": "" if begins is None else _pack(_bits(begins[cut])),
        "titles": [
            f"Sample {number}" + (f", {name}" if name else "")
            for number, name in zip(first.samples[:count].tolist(), names, strict=False)
        ],
        "scale": _scale(shown[opens], count, length),
    }


def _data(dump: TokenDump, settings: RunSettings) -> str:
    """Say whether a dump is of training or validation data, and of which datasets."""
    training = dump.about.split == "train"
    names = settings.names("train_data_path" if training else "validation_set_names")
    names = names or settings.names("data_path" if training else "valid_data_path")
    named = ", ".join((names or settings.names("data_path"))[: None if training else 1])
    return f"{'training' if training else 'validation'} data" + (f" ({named})" if named else "")


def _opens(dumps: list[TokenDump], count: int, length: int) -> int:
    """Return the index of the last dump that selects some tokens and not others, or else of the
    last dump."""
    for at in range(len(dumps) - 1, -1, -1):
        dump = dumps[at]
        valid = dump.valid[:count, :length]
        if dump.selected is not None and valid.any():
            selected = dump.selected[:count, :length][valid]
            if selected.any() and not selected.all():
                return at
    return len(dumps) - 1


def _spread(dumps: list[TokenDump], most: int) -> list[TokenDump]:
    """Return at most `most` dumps, evenly spread, with the first and the last."""
    wanted = np.linspace(0, len(dumps) - 1, min(len(dumps), most, MOST_DUMPS))
    return [dumps[at] for at in sorted({round(at) for at in wanted.tolist()})]


def _scale(dump: TokenDump, count: int, length: int) -> float:
    """Return the nats at which the shading is strongest, which few tokens of a dump exceed.

    The dump is the one shown first.  At the start of a run, tokens differ from the reference by far
    more; on that scale, all later ones would look pale.
    """
    known = dump.reference_losses
    shaded = dump.losses if known is None else dump.losses - known
    values = np.abs(shaded[:count, :length][dump.valid[:count, :length]])
    values = values[np.isfinite(values)]
    return max(0.5, round(float(np.quantile(values, 0.95)) * 2) / 2) if len(values) else 0.5


def _rounded(losses: NDArray[np.float32]) -> NDArray[np.uint16]:
    steps = np.rint(np.nan_to_num(losses, nan=np.inf) * float(STEPS_PER_NAT))
    return np.clip(steps, 0, np.iinfo(np.uint16).max).astype("<u2")


def _bits(flags: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return np.packbits(flags, bitorder="little")


def _pack(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
