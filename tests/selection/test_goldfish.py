"""The goldfish mask against a loop in integers, and what it promises."""

from __future__ import annotations

import torch

from megatron_slm.selection import kept_by_goldfish


def labels(samples: int, length: int, vocabulary: int = 50_000) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(1, vocabulary, (samples, length), generator=draw)


def test_agrees_with_a_loop() -> None:
    table = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2971215073)).tolist()
    drawn = labels(2, 60)
    drawn[1, 20] = 0
    for k, h in ((4, 13), (2, 1), (50, 50), (3, 60)):
        found = kept_by_goldfish(drawn, k, h).tolist()
        for row, kept in zip(drawn.tolist(), found, strict=True):
            for at in range(len(row)):
                product = 1
                for label in row[max(0, at - h + 1) : at + 1]:
                    product *= 2 * label + 1
                product = (product + 2**63) % 2**64 - 2**63  # as int64 wraps around
                assert kept[at] == (at < h - 1 or table[product % 1_000_003] >= 1 / k)


def test_a_passage_is_masked_alike_wherever_it_stands() -> None:
    passage, h = labels(1, 300), 13
    other = labels(1, 900).flip(1)
    alone = kept_by_goldfish(passage, 4, h)[:, h - 1 :]
    within = kept_by_goldfish(torch.cat([other[:, :77], passage, other[:, 77:]], 1), 4, h)
    assert torch.equal(within[:, 77 + h - 1 : 377], alone)


def test_how_many_are_left_out() -> None:
    for k, h in ((4, 13), (50, 13), (4, 50), (50, 50), (4, 100)):
        kept = kept_by_goldfish(labels(50, 2000), k, h)[:, h - 1 :]
        assert abs((~kept).double().mean().item() - 1 / k) < 0.1 / k


def test_an_id_of_0_is_as_any_other() -> None:
    """It ends the documents of many tokenizers."""
    drawn = labels(50, 2000)
    drawn[:, ::20] = 0
    kept = kept_by_goldfish(drawn, 4, 13)[:, 12:]
    for at in range(20):
        assert abs((~kept[:, at::20]).double().mean().item() - 1 / 4) < 0.03
