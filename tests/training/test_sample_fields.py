"""Samples of a script's own datasets: what they lack, and what would be misread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.training.sample_fields import FIELDS, check_fields, check_read

LENGTH = 8


def batch(**others: Tensor) -> dict[str, Tensor]:
    """Return a micro-batch of two samples."""
    return {name: torch.zeros(2, LENGTH, dtype=FIELDS[name]) for name in FIELDS} | others


BOUNDS = torch.tensor([[0, 3, *[LENGTH] * (LENGTH - 1)]] * 2)


def test_fields_that_are_there() -> None:
    check_fields(batch(source=torch.zeros(2)), LENGTH, packs=False, of_a_blend=False)
    ids = torch.zeros(2)
    check_fields(batch(cu_seqlens=BOUNDS, dataset_id=ids), LENGTH, packs=True, of_a_blend=True)


@pytest.mark.parametrize(
    "sample, packs, of_a_blend, says",
    [
        ({"text": torch.zeros(2, LENGTH + 1)}, False, False, "have no tokens"),
        (batch(), True, False, "have no cu_seqlens"),
        (batch(), False, True, "have no dataset_id"),
        (batch(labels=torch.zeros(2, LENGTH + 1)), False, False, r"labels of the shape \[9\]"),
        (batch(cu_seqlens=BOUNDS[:, :3]), True, False, r"cu_seqlens of the shape \[3\]"),
        (batch(cu_seqlens=BOUNDS), False, False, "would be ignored"),
    ],
)
def test_fields_that_are_refused(
    sample: dict[str, Tensor], packs: bool, of_a_blend: bool, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        check_fields(sample, LENGTH, packs=packs, of_a_blend=of_a_blend)


def test_a_stage_without_data() -> None:
    with pytest.raises(UserError, match="a pipeline stage has none"):
        check_read(None)
    check_read(iter(()))
