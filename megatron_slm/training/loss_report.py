"""Report a micro-batch to Megatron's log, as [sum, count] pairs that Megatron adds up and divides.

All sums are computed together, by a dozen kernels a micro-batch, whatever is reported.
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
    """Return the report of a micro-batch whose tokens were chosen: pairs, float32 [2], by name.

    The policy's losses are reported with padding in their softmax, as Megatron reports them in
    causal language modeling; scores and excess losses are without padding.

    Args:
        batch: the micro-batch.
        choice: the tokens chosen.
        loss: the loss to train on, the sum over selected tokens, 0-dim.
        losses: the losses of all tokens without padding, [b, s/c].
        trained: the losses of all tokens with padding, [b, s/c].
        domains: names of the blend's datasets, which batch.domains numbers; empty if they are not
            to be reported.
        of_all: report the mean over all tokens as lm loss, and not the loss to train on.
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
    # The threshold is averaged over micro-batches; one without valid tokens has none.
    below += [choice.any_valid[None], counts[:1]]
    names += ["selected ratio", "threshold", "lm loss"]
    if domains and batch.domains is not None:
        numbers = torch.arange(len(domains), device=valid.device)
        here = (batch.domains == numbers[:, None])[:, None, :, None] & places[:2]
        sums, counts = _sums(here, trained)  # [domains, 2]
        above += [sums.flatten(), counts[:, 0]]
        below += [counts.flatten(), counts.sum(1)]
        names += [f"{part} {name}" for name in domains for part in names[:2]]
        names += [f"selected ratio {name}" for name in domains]
    # The bound makes the mean over no token 0, since a NaN would spoil the average of a whole log
    # interval; it is too small to change any other count.
    pairs = torch.stack([torch.cat(above), torch.cat(below).clamp(min=1e-30)], dim=1)
    report = dict(zip(names, pairs.unbind(), strict=True))
    if of_all:
        report["lm loss"] = report["all-token loss"]
    return {name: report[name] for name in _in_order(names, domains)}


def _sums(where: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and the number of the values at `where`, [..., b, s], over b and s."""
    return torch.where(where, values, 0.0).sum((-2, -1)), where.sum((-2, -1))


def _in_order(names: Sequence[str], domains: Sequence[str]) -> list[str]:
    """Return the names in the order in which the log is to show them."""
    first = ["lm loss", *names[:3], "selected ratio", "threshold"]
    rest = [name for name in ("reference loss", "excess loss") if name in names]
    parts = ("selected loss", "unselected loss", "selected ratio")
    of_domains = [f"{part} {name}" for name in domains for part in parts]
    return [*first, *rest, *(name for name in of_domains if name in names)]
