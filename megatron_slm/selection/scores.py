"""Score tokens: those with the highest scores are selected.

    excess             L_policy - L_reference: what the reference has learnt and the policy has not
                       (Rho-1, eq. 3; for whole examples: RHO-LOSS, Mindermann et al. 2022)
    lowest             its inverse, as a control: the tokens with the least to learn
    reference          -L_reference: tokens that the reference finds likely, whatever the policy
                       does (the corpus filter of Rho-1's self-reference ablation)
    reference-entropy  -H_reference: tokens where the reference is sure (from the same ablation)
    policy             L_policy: tokens that the policy finds hard (online hard examples,
                       Shrivastava et al. 2016; Selective-Backprop, Jiang et al. 2019)
    policy-entropy     H_policy: tokens where the policy is unsure (uncertainty sampling, Lewis and
                       Gale 1994)
    random             chance, as a control

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
    """Return the scores of tokens, float32 [b, s].

    Entropies and the reference's tensors may be None if the score does not use them.

    Args:
        score: the name of the score.
        losses: the policy's losses, float32 [b, s].
        entropies: the policy's entropies, float32 [b, s].
        reference_losses: the reference's losses, float32 [b, s].
        reference_entropies: the reference's entropies, float32 [b, s].
        draw: returns random scores.
    """

    def known(values: Tensor | None) -> Tensor:
        assert values is not None, f"score {score} needs it"
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
    """Draw uniform scores, float32 [b, s], that depend on nothing but (seed, iteration, sample).

    Args:
        seed: the run's seed.
        iteration: the step.
        samples: numbers of the samples within the global batch, int64 [b].
        length: tokens of a whole sequence, s.
        device: where the scores are needed.
    """
    draw = torch.Generator()
    rows = []
    for sample in samples.tolist():
        draw.manual_seed(zlib.crc32(f"{seed} {iteration} {sample}".encode()))
        rows.append(torch.rand(length, generator=draw))
    whole = torch.stack(rows)
    # A copy from pinned memory does not make the host wait.
    return whole.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else whole


def context_parallel_part(whole: Tensor, rank: int, size: int) -> Tensor:
    """Return the columns [b, s/c] of [b, s] that a context-parallel rank holds (zigzag order)."""
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)
