"""The Triton kernel of selection in Triton's interpreter, against the plain form: bit by bit."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megatron_slm.selection import select_top_fraction, top_fraction_triton
from megatron_slm.selection.top_fraction import Selection, in_units

CASES = 24
EXTREMES = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, float("inf"), -float("inf")]


def same(found: Selection, expected: Selection, where: object) -> None:
    """NaN is a threshold of no tokens, so bits are compared."""
    for name, value in vars(expected).items():
        bits = torch.int32 if value.dtype == torch.float32 else value.dtype
        assert torch.equal(getattr(found, name).view(bits), value.view(bits)), (where, name)


def draw_scores(case: int, rows: int, length: int, draw: torch.Generator) -> Tensor:
    """Draw scores: normal, with many ties, of extremes alone, or with NaN among them."""
    scores = torch.randn(rows, length, generator=draw)
    if case % 4 == 1:
        return scores.round()
    if case % 4 == 2:
        return torch.tensor(EXTREMES)[torch.randint(0, 9, (rows, length), generator=draw)]
    if case % 4 == 3:
        scores[torch.rand(rows, length, generator=draw) < 0.1] = torch.nan
    return scores


def main() -> None:
    """One set, sets of samples, a set a sample; blocks that do and do not fill up."""
    for case in range(CASES):
        draw = torch.Generator().manual_seed(case)
        rows, length = (int(torch.randint(1, most, (), generator=draw)) for most in (6, 60))
        scores = draw_scores(case, rows, length, draw)
        valid = torch.rand(rows, length, generator=draw) > (0.97 if case % 5 == 0 else 0.1)
        number = (1, 3, rows)[case % 3]
        sets = torch.randint(0, number, (rows,), generator=draw)
        if number == rows:
            sets = torch.arange(rows)
        ratios = (1e-6 + (1 - 1e-6) * torch.rand(number, generator=draw)).tolist()
        top_fraction_triton.BLOCK = (32, 64, 256)[case // 3 % 3]
        units = in_units(ratios, scores.device)
        kernel = Selection(*top_fraction_triton.select(scores, valid, units, sets))
        same(kernel, select_top_fraction(scores, valid, ratios, sets), case)
    top_fraction_triton.try_out(torch.device("cpu"))
    print("the same bits")


if __name__ == "__main__":
    sys.exit(main())
