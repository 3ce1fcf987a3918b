"""Score tokens: those with the highest scores are selected.

Each score is a function of tokens (functions.py), and its docstring says where it comes from.
Losses L and entropies H are in nats.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megatron_slm.selection.functions import TokenFunction, token_score
from megatron_slm.selection.tokens import Tokens


@token_score(needs=("reference_losses",))
def excess(tokens: Tokens) -> Tensor:
    """Compute L_policy - L_reference: what the reference has learnt and the policy has not.

    Rho-1 (arXiv 2404.07965), eq. 3; for whole examples RHO-LOSS, Mindermann et al. 2022.
    """
    return tokens.losses - tokens.reference_losses


@token_score(needs=("reference_losses",))
def lowest(tokens: Tokens) -> Tensor:
    """Compute L_reference - L_policy, as a control: the tokens with the least to learn."""
    return tokens.reference_losses - tokens.losses


@token_score(needs=("reference_losses",))
def retrospective(tokens: Tokens) -> Tensor:
    """Compute L_history - L_policy: what the policy has learnt since its history.

    The retrospective excess loss of ssToken (arXiv 2510.18250), whose history is the checkpoint
    that training starts from (as the reference) or the moving average of the policy's weights.  It
    is the formula of `lowest`; with a history in place of a better model it means the opposite.
    ssToken adds a score of attention, which is not computed here.
    """
    return tokens.reference_losses - tokens.losses


@token_score(needs=("reference_losses",))
def reference(tokens: Tokens) -> Tensor:
    """Compute -L_reference: tokens that the reference finds likely, whatever the policy does.

    The corpus filter of Rho-1's self-reference ablation.
    """
    return -tokens.reference_losses


@token_score(needs=("reference_entropies",))
def reference_entropy(tokens: Tokens) -> Tensor:
    """Compute -H_reference: tokens where the reference is sure (from the same ablation)."""
    return -tokens.reference_entropies


@token_score(needs=("reference_losses",))
def context(tokens: Tokens) -> Tensor:
    """Compute |L_policy - L_reference|, for a reference that sees a short context alone.

    The sparse weights of Helm et al. (arXiv 2503.09202): the tokens of each sequence for which a
    long context matters most count equally.  Theirs are floor(k * N) tokens, ours the nearest
    integer, and ties are drawn there and go to the earlier token here.
    """
    return (tokens.losses - tokens.reference_losses).abs()


@token_score()
def policy(tokens: Tokens) -> Tensor:
    """Compute L_policy: tokens that the policy finds hard.

    Online hard examples, Shrivastava et al. 2016; Selective-Backprop, Jiang et al. 2019; ESLM
    (arXiv 2505.19893) with losses, whose confidence level alpha is a ratio of 1 - alpha.
    """
    return tokens.losses


@token_score(needs=("entropies",))
def policy_entropy(tokens: Tokens) -> Tensor:
    """Compute H_policy: tokens where the policy is unsure.

    Uncertainty sampling, Lewis and Gale 1994; ESLM (arXiv 2505.19893) with entropies, whose
    confidence level alpha is a ratio of 1 - alpha.
    """
    return tokens.entropies


@token_score(needs=("external",))
def external(tokens: Tokens) -> Tensor:
    """Rank by an outside value of each token, such as a classifier's."""
    return tokens.external


@token_score(needs=("random",))
def random(tokens: Tokens) -> Tensor:
    """Draw scores by chance, as a control."""
    return tokens.random


SCORE_FUNCTIONS: dict[str, TokenFunction] = {
    "excess": excess,
    "lowest": lowest,
    "retrospective": retrospective,
    "reference": reference,
    "reference-entropy": reference_entropy,
    "context": context,
    "policy": policy,
    "policy-entropy": policy_entropy,
    "external": external,
    "random": random,
}
SCORES = tuple(SCORE_FUNCTIONS)


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
