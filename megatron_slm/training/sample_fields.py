"""What the samples of a run's datasets have to be: Megatron's are, and a script's own must be.

Other tensor-parallel ranks learn of a field by a broadcast into a tensor of the expected shape and
type, which takes anything else for wrong numbers, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_slm.errors import UserError

FIELDS = {
    "tokens": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
}
"""The fields of every sample, and the types in which a micro-batch has them."""
WHAT = {
    "cu_seqlens": "which say where their documents end: add them, or leave "
    "--dataloader-inter-document-masking out",
    "dataset_id": "the number of each sample's dataset, counted as --data-path lists them: add it, "
    "or name a single dataset",
}


def check_read(data_iterator: object) -> None:
    """Check that there is data on a rank that reads it.

    Raises:
        UserError: the script's own datasets are None there.
    """
    if data_iterator is None:
        raise UserError(
            "a pipeline stage has none of this script's own datasets: they are read on the first "
            "and on the last stage, and with --dataloader-inter-document-masking on each"
        )


def check_fields(
    sample: Mapping[str, Tensor], length: int, *, packs: bool, of_a_blend: bool
) -> None:
    """Check the fields of a micro-batch's samples.

    Args:
        sample: what the loader yielded.
        length: tokens in a sample, s.
        packs: whether documents of a sample do not see each other.
        of_a_blend: whether the run has to know each sample's dataset.

    Raises:
        UserError: a field is missing, has another shape than [b, s] ([b, s + 1] for cu_seqlens), or
            would be ignored although it changes what is computed.
    """
    needed = [*FIELDS, *["cu_seqlens"] * packs, *["dataset_id"] * of_a_blend]
    for name in needed:
        if name not in sample:
            what = WHAT.get(name, f"of which they need {', '.join(FIELDS)}, each of {length}")
            raise UserError(f"the samples of this script's own datasets have no {name}, {what}")
    for name in needed[: len(FIELDS) + packs]:
        wanted, shape = length + (name == "cu_seqlens"), tuple(sample[name].shape)
        if len(shape) != 2 or shape[1] != wanted:
            raise UserError(
                f"the samples of this script's own datasets have {name} of the shape "
                f"{list(shape[1:])}, and --seq-length {length} wants [{wanted}]"
            )
    if "cu_seqlens" in sample and not packs:
        raise UserError(
            "the samples of this script's own datasets have cu_seqlens, which would be ignored: "
            "give --dataloader-inter-document-masking, so that documents do not see each other, or "
            "leave the field out"
        )
