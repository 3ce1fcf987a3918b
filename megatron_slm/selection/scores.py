"""What tokens are ranked by: the higher the score, the sooner a token is selected.

    excess             L_policy - L_reference: what the reference has learnt and the policy has not
                       (Rho-1, eq. 3; for examples: RHO-LOSS, Mindermann et al. 2022)
    lowest             the inverse of it, a control: the tokens with the least to learn
    reference          -L_reference: tokens the reference finds likely, whatever the policy does
                       (the corpus filter of Rho-1's self-reference ablation)
    reference-entropy  -H_reference: tokens at positions where the reference is sure (same)
    policy             L_policy: tokens the policy finds hard (online hard examples, Shrivastava et
                       al. 2016; Selective-Backprop, Jiang et al. 2019)
    policy-entropy     H_policy: positions where the policy is unsure (uncertainty sampling, Lewis
                       and Gale 1994)
    random             a control: k% of the tokens by chance

Losses L and entropies H are in nats.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Score = Literal[
    "excess", "lowest", "reference", "reference-entropy", "policy", "policy-entropy", "random"
]
SCORES: tuple[Score, ...] = get_args(Score)
NEED_REFERENCE: frozenset[Score] = frozenset({"excess", "lowest", "reference", "reference-entropy"})


def token_scores(
    score: Score,
    losses: Tensor,
    entropies: Tensor | None,
    reference_losses: Tensor | None,
    reference_entropies: Tensor | None,
    draw: Callable[[], Tensor],
) -> Tensor:
    """Return the scores of tokens, float32 [b, s]; a higher score is selected sooner.

    Args:
        losses, entropies: the policy's, float32 [b, s].
        reference_losses, reference_entropies: the reference's.  Of all these only those that the
            score is made of are needed.
        draw: returns random scores.
    """

    def known(values: Tensor | None) -> Tensor:
        assert values is not None, f"{score} is made of it"
        return values

    match score:
        case "excess":
            scores = losses - known(reference_losses)
        case "lowest":
            scores = known(reference_losses) - losses
        case "reference":
            scores = -known(reference_losses)
        case "reference-entropy":
            scores = -known(reference_entropies)
        case "policy":
            scores = losses
        case "policy-entropy":
            scores = known(entropies)
        case "random":
            scores = draw()
    return scores


def random_scores(
    seed: int, iteration: int, samples: Tensor, length: int, device: torch.device
) -> Tensor:
    """Uniform scores, float32 [b, s], that depend on nothing but (seed, iteration, sample).

    Args:
        samples: int64 [b], numbers of the samples within the global batch.
        length: tokens of a whole sequence, s.
    """
    draw = torch.Generator()
    rows = []
    for sample in samples.tolist():
        draw.manual_seed(zlib.crc32(f"{seed} {iteration} {sample}".encode()))
        rows.append(torch.rand(length, generator=draw))
    whole = torch.stack(rows)
    # From pinned memory the copy does not wait for the device.
    return whole.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else whole


def context_parallel_part(whole: Tensor, rank: int, size: int) -> Tensor:
    """Columns [b, s/c] of [b, s] that context-parallel rank `rank` of c holds (zigzag)."""
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)
