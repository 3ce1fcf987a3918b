"""What a micro-batch reports to Megatron's log: [sum, count] pairs, which it adds up and divides.

All sums are made at once, a dozen kernels a micro-batch whatever is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_slm.selection import Choice
from megatron_slm.training.micro_batch import MicroBatch


def report_of(
    batch: MicroBatch,
    choice: Choice,
    loss: Tensor,
    *,
    losses: Tensor,
    trained: Tensor,
    domains: Sequence[str],
    of_all: bool,
) -> dict[str, Tensor]:
    """Return the report of a micro-batch whose tokens were chosen, pairs of float32 by name.

    Args:
        loss: what is trained on, 0-dim: the sum over selected tokens.
        losses, trained: of all tokens, without and with the vocabulary's padding, [b, s/c].  The
            policy's losses are Megatron's, as in causal language modeling, so with padding; scores
            and excess are without.
        domains: names of the blend's datasets, for batch.domains.
        of_all: lm loss is to be that of all tokens, and not what is trained on.
    """
    valid, selected = batch.valid, choice.selected
    unselected = valid ^ selected
    names = ["selected loss", "unselected loss", "all-token loss"]
    where, values = [selected, unselected, valid], [trained] * 3
    if batch.reference_losses is not None:
        names += ["reference loss", "excess loss"]
        where += [valid] * 2
        values += [batch.reference_losses, losses - batch.reference_losses]
    places = torch.stack(where)
    sums, counts = _sums(places, torch.stack(values))
    above, below = [sums, counts[:1], choice.threshold[None], loss[None]], [counts, counts[2:3]]
    # The threshold is averaged over micro-batches; of one without valid tokens there is none.
    below += [choice.any_valid[None], counts[:1]]
    names += ["selected ratio", "threshold", "lm loss"]
    if batch.domains is not None:
        numbers = torch.arange(len(domains), device=valid.device)
        here = (batch.domains == numbers[:, None])[:, None, :, None] & places[:2]
        sums, counts = _sums(here, trained)  # [domains, 2]
        above += [sums.flatten(), counts[:, 0]]
        below += [counts.flatten(), counts.sum(1)]
        names += [f"{part} {name}" for name in domains for part in names[:2]]
        names += [f"selected ratio {name}" for name in domains]
    # So that the mean over no token is 0: a NaN would spoil the average of a whole log interval.
    # Too small to change any count.
    pairs = torch.stack([torch.cat(above), torch.cat(below).clamp(min=1e-30)], dim=1)
    report = dict(zip(names, pairs.unbind(), strict=True))
    if of_all:
        report["lm loss"] = report["all-token loss"]
    return {name: report[name] for name in _in_order(names, domains)}


def _sums(where: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the values at `where`, [..., b, s], of each of the leading indices."""
    return torch.where(where, values, 0.0).sum((-2, -1)), where.sum((-2, -1))


def _in_order(names: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Return the names as the log is to show them."""
    first = ["lm loss", *names[:3], "selected ratio", "threshold"]
    rest = [name for name in ("reference loss", "excess loss") if name in names]
    parts = ("selected loss", "unselected loss", "selected ratio")
    of_domains = [f"{part} {name}" for name in domains for part in parts]
    return [*first, *rest, *(name for name in of_domains if name in names)]
