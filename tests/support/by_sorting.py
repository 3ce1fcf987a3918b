"""The top fraction of a list by Python's own sort: what the tests of selection compare with."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor


def count_of(ratio: float, number: int) -> int:
    """max(1, ratio * number rounded half up); 0 of 0."""
    count = int(Fraction(str(ratio)) * number + Fraction(1, 2))
    return min(number, max(1, count))


def top(scores: Sequence[float], valid: Sequence[bool], ratio: float) -> list[bool]:
    """Select the highest scores; ties go to the lower position."""
    candidates = [i for i, is_valid in enumerate(valid) if is_valid]
    # Python's sort is stable and has -0.0 equal to 0.0.
    kept = sorted(candidates, key=lambda i: -scores[i])[: count_of(ratio, len(candidates))]
    chosen = set(kept)
    return [i in chosen for i in range(len(scores))]


def top_of_sets(scores: Tensor, valid: Tensor, sets: list[int], ratios: list[float]) -> Tensor:
    """Do the same for [b, s], with each set of samples on its own; return bool [b, s]."""
    selected = valid.clone().zero_()
    for number, ratio in enumerate(ratios):
        rows = [row for row, mine in enumerate(sets) if mine == number]
        if rows:
            chosen = top(scores[rows].flatten().tolist(), valid[rows].flatten().tolist(), ratio)
            selected[rows] = selected.new_tensor(chosen).view(len(rows), -1)
    return selected


def top_of_documents(
    scores: Tensor, valid: Tensor, documents: Tensor, ratios: Sequence[float]
) -> Tensor:
    """Do the same within each document of each sample, whose ratio is given; return bool [b, s]."""
    selected = valid.clone().zero_()
    for row, ratio in enumerate(ratios):
        numbers = documents[row].tolist()
        for number in set(numbers):
            at = [i for i, own in enumerate(numbers) if own == number]
            chosen = top(scores[row, at].tolist(), valid[row, at].tolist(), ratio)
            selected[row, at] = selected.new_tensor(chosen)
    return selected
