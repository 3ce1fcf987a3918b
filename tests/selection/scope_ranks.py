"""One rank of test_scope.py: selects from its part of micro-batches all ranks can make."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, distributed

from megatron_slm.selection import select_in_micro_batch, select_top_fraction

CASES = 60


def micro_batch(case: int, size: int) -> tuple[Tensor, Tensor, float]:
    """Scores with many ties, holes in the mask, and a ratio; the same on every rank."""
    draw = torch.Generator().manual_seed(case)
    samples = int(torch.randint(1, 4, (), generator=draw))
    length = 2 * size * int(torch.randint(1, 40, (), generator=draw))
    scores = torch.randn(samples, length, generator=draw)
    if case % 3 == 0:
        scores = scores.round()
    if case % 7 == 0:
        scores = torch.zeros_like(scores)
    valid = torch.rand(samples, length, generator=draw) > (0.2 if case % 5 else 0.98)
    if case % 11 == 0:
        valid = torch.zeros_like(valid)
    return scores, valid, (case % 10 + 1) / 10


def part(whole: Tensor, rank: int, size: int) -> Tensor:
    """Megatron's context-parallel part: chunks rank and 2*size-1-rank."""
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


def main() -> None:
    """Compare with the selection of one rank that holds everything; count the traffic."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    group = distributed.group.WORLD
    traffic: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: Tensor, *args: object, **kwargs: object) -> object:
        traffic.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    for case in range(CASES):
        scores, valid, ratio = micro_batch(case, size)
        expected = select_top_fraction(scores.flatten(), valid.flatten(), ratio)
        traffic.clear()
        mine = select_in_micro_batch(
            part(scores, rank, size), part(valid, rank, size), ratio, group
        )
        whole = expected.selected.view(scores.shape)
        assert torch.equal(mine.selected, part(whole, rank, size)), case
        assert mine.count == expected.count, case
        assert mine.valid == expected.valid, case
        if expected.count > 0:
            assert mine.threshold == expected.threshold, case
        assert len(traffic) <= 4, traffic
        assert sum(traffic) <= 64 << 10, traffic
    distributed.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    sys.exit(main())
