"""What a micro-batch reports: the sums that each pair says, bit by bit, in few launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from launches import Launches
from megatron_slm.selection import Choice, RatioSchedule, SelectionSettings
from megatron_slm.training.loss_report import report_of
from megatron_slm.training.micro_batch import MicroBatch
from megatron_slm.training.settings import MOST_REPORTED, SelectiveSettings

SHAPE = (6, 50)
DOMAINS = ("prose", "code", "mail")


def pair(values: Tensor, where: Tensor) -> Tensor:
    """Written out: the sum of values at `where`, and how many there are; 1e-30 for none."""
    count = where.sum().float().clamp(min=1e-30)
    return torch.stack([torch.where(where, values, 0.0).sum(), count])


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.stack([part.sum().float(), whole.sum().float().clamp(min=1e-30)])


def written_out(
    batch: MicroBatch, selected: Tensor, loss: Tensor, losses: Tensor, trained: Tensor
) -> dict[str, Tensor]:
    valid, reference = batch.valid, batch.reference_losses
    report = {
        "lm loss": torch.stack([loss, selected.sum().float().clamp(min=1e-30)]),
        "selected loss": pair(trained, selected),
        "unselected loss": pair(trained, valid & ~selected),
        "all-token loss": pair(trained, valid),
        "selected ratio": ratio(selected, valid),
        "threshold": torch.tensor([0.25, 1.0]),
    }
    if reference is not None:
        report["reference loss"] = pair(reference, valid)
        report["excess loss"] = pair(losses - reference, valid)
    if batch.domains is not None:
        for number, name in enumerate(DOMAINS):
            here = valid & (batch.domains == number)[:, None]
            report[f"selected loss {name}"] = pair(trained, here & selected)
            report[f"unselected loss {name}"] = pair(trained, here & ~selected)
            report[f"selected ratio {name}"] = ratio(here & selected, here)
    return report


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("with_domains", [True, False])
def test_report(with_reference: bool, with_domains: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    losses, trained, reference = 5.0 * torch.rand(3, *SHAPE, generator=draw)
    mask = (torch.rand(SHAPE, generator=draw) > 0.1).float()
    batch = MicroBatch(0, loss_mask=mask, reference_losses=reference if with_reference else None)
    if with_domains:  # and none of the third
        batch.domains = torch.randint(0, 2, SHAPE[:1], generator=draw)
    selected = batch.valid & (torch.rand(SHAPE, generator=draw) < 0.6)
    choice = Choice(selected, None, torch.tensor(0.25), torch.tensor(True))
    loss = torch.tensor(17.0)
    for of_all in (False, True):
        with Launches() as launches:
            report = report_of(
                batch, choice, loss, losses=losses, trained=trained, domains=DOMAINS, of_all=of_all
            )
        assert len(launches.names) <= (30 if with_domains else 15), launches.names
        expected = written_out(batch, selected, loss, losses, trained)
        if of_all:
            expected["lm loss"] = expected["all-token loss"]
        assert list(report) == list(expected)
        for name, value in expected.items():
            assert torch.equal(report[name], value), name


def test_nothing_valid() -> None:
    """Means of no token are 0, and such a micro-batch has no threshold."""
    nothing = torch.zeros(SHAPE).bool()
    batch = MicroBatch(0, loss_mask=torch.zeros(SHAPE))
    choice = Choice(nothing, None, torch.tensor(0.0), torch.tensor(False))
    losses = torch.ones(SHAPE)
    loss = torch.tensor(0.0)
    report = report_of(batch, choice, loss, losses=losses, trained=losses, domains=(), of_all=False)
    for value in report.values():
        assert value[0] / value[1] == 0.0


def test_many_datasets() -> None:
    """Megatron sums each value over ranks by itself, in every step: those of thousands of shards
    would take longer than the step."""

    def reported(count: int) -> dict[str, Tensor]:
        names = tuple(map(str, range(count)))
        settings = SelectiveSettings(
            SelectionSettings(), RatioSchedule(0.6), 0, True, "chunked", names, 1
        )
        batch = MicroBatch(0, loss_mask=torch.ones(SHAPE), domains=torch.zeros(SHAPE[0]).long())
        choice = Choice(batch.valid, None, torch.tensor(0.0), torch.tensor(True))
        values = dict.fromkeys(("losses", "trained"), torch.ones(SHAPE))
        domains = settings.reported
        return report_of(batch, choice, torch.tensor(0.0), **values, domains=domains, of_all=False)

    assert list(reported(MOST_REPORTED + 1)) == list(reported(0))
    assert len(reported(MOST_REPORTED)) == len(reported(0)) + 3 * MOST_REPORTED
