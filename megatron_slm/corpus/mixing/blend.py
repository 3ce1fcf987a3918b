"""Find out what training draws from a mix, from the blend that Megatron itself builds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_slm.corpus.mixing.mix import Mix, Share
from megatron_slm.data.indices import building_indices
from megatron_slm.errors import UserError

TOLERANCE = 1e-3  # of all tokens


def check_draws(recipe: Mix, shares: Sequence[Share], sequence_length: int) -> list[float]:
    """Return each source's fraction of the tokens drawn when training on the whole budget.

    Raises:
        UserError: a fraction differs from the recipe's by more than TOLERANCE of all tokens. For a
            small source, a smaller difference can still be large relative to its share.
    """
    weights = {path: weight for share in shares for path, weight in share.weights.items()}
    samples = recipe.budget // sequence_length
    drawn = drawn_by_dataset(weights, samples, sequence_length)
    found = []
    for share in shares:
        part = sum(drawn[path] for path in share.available) / sum(drawn.values())
        wanted = share.tokens / recipe.budget
        if abs(part - wanted) > TOLERANCE:
            raise UserError(
                f"{recipe.path}: training on {samples:,} samples of {sequence_length} tokens would "
                f"draw {part:.3%} from {share.source.name}, not {wanted:.3%}"
            )
        found.append(part)
    return found


def drawn_by_dataset(weights: dict[str, int], samples: int, sequence_length: int) -> dict[str, int]:
    """Count how many of the first `samples` samples come from each dataset, by prefix."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    paths = [path for path, weight in weights.items() if weight]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=sequence_length,
        blend=(paths, [float(weights[path]) for path in paths]),
        split="1,0,0",
        # Only its end-of-document id is used, since no sample is read.
        tokenizer=MegatronTokenizer.from_pretrained(
            metadata_path={"library": "null-text"}, vocab_size=2
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    with building_indices("make room beside the dataset, or leave out --check-sequence-length"):
        blend, _, _ = builder.build()
    counts = np.bincount(blend.dataset_index[:samples], minlength=len(paths))
    return dict.fromkeys(weights, 0) | dict(zip(paths, counts.tolist(), strict=True))
