"""One rank of test_scopes.py: every scope over a grid of data- and context-parallel ranks.

All ranks make the same scores of a whole step; each chooses from its part, and checks its part of
what a sort chooses from the whole.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, distributed

from by_sorting import top_of_documents, top_of_sets
from megatron_slm.selection import DocumentPlaces, Ranks, SelectionSettings, TokenSelector

CASES = 30
MICRO_BATCHES, SAMPLES = 3, 2


class Grid:
    """dp x cp ranks, and the traffic of their all-reduces."""

    def __init__(self, cp_size: int) -> None:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        self.cp_size, self.dp_size = cp_size, size // cp_size
        self.dp_rank, self.cp_rank = divmod(rank, cp_size)
        groups = [
            distributed.new_group(list(range(first, first + cp_size)))
            for first in range(0, size, cp_size)
        ]
        self.ranks = Ranks(
            groups[self.dp_rank], distributed.group.WORLD, self.dp_rank, self.dp_size
        )

    def part(self, whole: Tensor) -> list[Tensor]:
        """Return this rank's part of [samples of a step, s], by micro-batch."""
        mine = []
        for number in range(MICRO_BATCHES):
            first = (number * self.dp_size + self.dp_rank) * SAMPLES
            chunks = whole[first : first + SAMPLES].chunk(2 * self.cp_size, dim=1)
            mine.append(torch.cat([chunks[self.cp_rank], chunks[-1 - self.cp_rank]], dim=1))
        return mine


def step(case: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, holes in the mask, and a domain of three for each sample."""
    draw = torch.Generator().manual_seed(case)
    samples = MICRO_BATCHES * grid.dp_size * SAMPLES
    length = 2 * grid.cp_size * int(torch.randint(1, 12, (), generator=draw))
    scores = torch.randn(samples, length, generator=draw)
    if case % 3 == 0:
        scores = scores.round()
    if case % 7 == 0:
        scores = torch.zeros_like(scores)
    valid = torch.rand(samples, length, generator=draw) > (0.2 if case % 5 else 0.98)
    if case % 11 == 0:
        valid = torch.zeros_like(valid)
    return scores, valid, torch.randint(0, 3, (samples,), generator=draw)


def scope_of_samples(scope: str, samples: int, dp_size: int) -> list[int]:
    """Return the number of the scope that each sample of the step competes in."""
    size = {"sequence": 1, "micro-batch": SAMPLES, "data-parallel": dp_size * SAMPLES}
    return [sample // size.get(scope, samples) for sample in range(samples)]


def check(case: int, scope: str, with_domains: bool, grid: Grid, traffic: list[int]) -> None:
    """Compare one scope with a sort, and count what was sent."""
    scores, valid, domains = step(case, grid)
    ratio, own = (case % 10 + 1) / 10, (0.3, None, 1.0)
    settings = SelectionSettings(
        scope=scope, exact=scope == "global-batch", domain_ratios=own if with_domains else ()
    )
    selector = TokenSelector(settings, grid.ranks)
    scopes = scope_of_samples(scope, len(scores), grid.dp_size)
    sets = [3 * number + int(domains[i] if with_domains else 0) for i, number in enumerate(scopes)]
    ratios = [ratio, ratio, ratio] if not with_domains else [0.3, ratio, 1.0]
    expected = top_of_sets(scores, valid, sets, ratios * (max(scopes) + 1))
    expected_parts = grid.part(expected)
    first = [(n * grid.dp_size + grid.dp_rank) * SAMPLES for n in range(MICRO_BATCHES)]
    own_domains = [domains[at : at + SAMPLES] for at in first]
    # A sequence is a set of its own; three domains make three sets.
    number_of_sets = SAMPLES if scope == "sequence" else 3 if with_domains else 1
    if scope == "global-batch":
        traffic.clear()
        choice = selector.choose_from_step(
            torch.cat(grid.part(scores)),
            torch.cat(grid.part(valid)),
            ratio,
            torch.cat(own_domains),
            MICRO_BATCHES,
        )
        assert torch.equal(choice.selected, torch.cat(expected_parts)), (case, scope)
        check_traffic(traffic, number_of_sets)
        return
    for scores_, valid_, domains_, expected_ in zip(
        grid.part(scores), grid.part(valid), own_domains, expected_parts, strict=True
    ):
        traffic.clear()
        choice = selector.choose(scores_, valid_, ratio, domains_)
        assert torch.equal(choice.selected, expected_), (case, scope)
        check_traffic(traffic, number_of_sets)


def check_documents(case: int, grid: Grid, traffic: list[int]) -> None:
    """Compare scope document with a sort: documents of any length, each spread over the ranks."""
    scores, valid, domains = step(case, grid)
    draw = torch.Generator().manual_seed(case)
    begins = torch.rand(scores.shape, generator=draw) < (0.02, 0.3, 1.0)[case % 3]
    begins[:, 0] = True
    numbers = begins.cumsum(1) - 1
    places = torch.arange(scores.shape[1])
    positions = places - torch.where(begins, places, 0).cummax(1).values
    selector = TokenSelector(
        SelectionSettings(scope="document", domain_ratios=(0.3, None, 1.0)), grid.ranks
    )
    ratios = [0.3, (case % 10 + 1) / 10, 1.0]
    expected = top_of_documents(scores, valid, numbers, [ratios[int(own)] for own in domains])
    traffic.clear()
    for number, parts in enumerate(
        zip(*map(grid.part, (scores, valid, numbers, positions, expected)), strict=True)
    ):
        first = (number * grid.dp_size + grid.dp_rank) * SAMPLES
        choice = selector.choose(
            *parts[:2], ratios[1], domains[first : first + SAMPLES], DocumentPlaces(*parts[2:4])
        )
        assert torch.equal(choice.selected, parts[4]), case
    assert not traffic  # one gather


def check_traffic(traffic: list[int], number_of_sets: int) -> None:
    assert len(traffic) <= 4, traffic
    assert sum(traffic) <= number_of_sets * (64 << 10), traffic


def main() -> None:
    """All scopes, with and without domains of their own ratios."""
    distributed.init_process_group("gloo")
    traffic: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: Tensor, *args: object, **kwargs: object) -> object:
        traffic.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    for cp_size in {1, 2, distributed.get_world_size()}:
        grid = Grid(cp_size)
        for case in range(CASES):
            for scope in ("sequence", "micro-batch", "data-parallel", "global-batch"):
                for with_domains in (False, True):
                    check(case, scope, with_domains, grid, traffic)
            check_documents(case, grid, traffic)
    distributed.destroy_process_group()
    print("agreed")


if __name__ == "__main__":
    sys.exit(main())
