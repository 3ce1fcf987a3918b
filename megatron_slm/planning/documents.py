"""Find out over how many tokens attention reaches where documents do not see each other.

Attention costs the sum of squared lengths of documents, as samples cut them.  Divided by the number
of tokens, that is the mean length of a document over its tokens, which takes the place of the
sample's length in the formulas.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_slm.data.indexed_format import open_index

MOST_DOCUMENTS = 1 << 22  # of a dataset, from its beginning


def document_length(args: Namespace) -> float | None:
    """Return the mean length of a run's documents over their tokens, as samples cut them.

    Datasets count by their weight in the training blend.

    Args:
        args: the run's arguments.

    Returns:
        The mean; None where documents see each other, and where the datasets are not there.

    Raises:
        UserError: a dataset's index is damaged.
    """
    if not getattr(args, "dataloader_inter_document_masking", False):
        return None
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes, weights = blend or (per_split or [None])[0] or ([], None)
    paths = [Path(f"{prefix}.idx") for prefix in prefixes]
    if not paths or not all(path.exists() for path in paths):
        return None
    of_datasets = [length_in_samples(open_index(path).lengths, args.seq_length) for path in paths]
    return float(np.average(of_datasets, weights=weights))


def length_in_samples(lengths: np.typing.NDArray[np.int32], sample: int) -> float:
    """Return the mean length, over tokens, of documents that are cut into samples as they come; 0
    where there are no tokens.

    Args:
        lengths: the lengths of the documents.
        sample: tokens of a sample.
    """
    ends = np.cumsum(lengths[:MOST_DOCUMENTS], dtype=np.int64)
    if not ends.size or not ends[-1]:
        return 0.0
    cuts = np.arange(sample, ends[-1], sample)
    # Where a document ends at a cut there is a part of 0 tokens more, which counts for nothing.
    parts = np.diff(np.sort(np.concatenate([ends, cuts])), prepend=0)
    return float(np.square(parts).sum(dtype=np.float64) / ends[-1])
