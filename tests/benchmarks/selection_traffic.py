"""Bytes that a selection over several ranks sends, counted at its all-reduces.

    python tests/benchmarks/selection_traffic.py

Real gloo ranks, scope data-parallel, for token counts that differ a thousandfold.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

SUPPORT = Path(__file__).parents[1] / "support"
sys.path.insert(0, str(SUPPORT))

TOKENS = (1 << 10, 1 << 14, 1 << 20)  # of each rank


def rank() -> None:
    """Select from random scores, and say what was sent."""
    import torch
    from torch import distributed

    from megatron_slm.selection import Ranks, SelectionSettings, TokenSelector

    distributed.init_process_group("gloo")
    me, size = distributed.get_rank(), distributed.get_world_size()
    sent: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    alone = [distributed.new_group([other]) for other in range(size)][me]
    distributed.all_reduce = counted
    selector = TokenSelector(
        SelectionSettings(scope="data-parallel"), Ranks(alone, distributed.group.WORLD, me, size)
    )
    for tokens in TOKENS:
        scores = torch.randn(4, tokens // 4, generator=torch.Generator().manual_seed(me))
        sent.clear()
        start = time.perf_counter()
        choice = selector.choose(scores, torch.ones_like(scores).bool(), 0.6)
        seconds = time.perf_counter() - start
        selected = choice.selected.sum()
        all_reduce(selected)
        if me == 0:
            print(
                f"{size} ranks x {tokens:8} tokens: {len(sent)} all-reduces, {sum(sent)} bytes "
                f"({tokens * 4} to gather the scores of one rank), {1e3 * seconds:.1f} ms, "
                f"{selected.item()} of {size * tokens} selected"
            )
    distributed.destroy_process_group()


def main() -> None:
    """Launch 2 and 4 ranks."""
    from launch import launch

    with tempfile.TemporaryDirectory() as directory:
        for ranks in (2, 4):
            run = launch(ranks, [__file__, "rank"], Path(directory) / str(ranks))
            print(run.outputs[0], end="")


if __name__ == "__main__":
    rank() if sys.argv[1:] == ["rank"] else main()
