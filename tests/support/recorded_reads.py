"""megatron_slm.pretrain, which writes to reads/rank*.json what this rank read of each checkpoint's
tensors, and what Megatron's default way reads of them; both must give the same values."""

from __future__ import annotations

import json
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from megatron_slm import pretrain

_pretrain = pretrain._pretrain


def train_recorded(args: Namespace) -> None:
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    items: list[str] = []
    loads: list[dict[str, Any]] = []
    read_data, load = FileSystemReader.read_data, dist_checkpointing.load

    def read_noted(self: FileSystemReader, plan: Any, planner: Any) -> Any:
        items.extend(
            f"{item.dest_index.fqn} {item.dest_offsets}"
            for item in plan.items
            if item.type == LoadItemType.TENSOR
        )
        return read_data(self, plan, planner)

    def loaded(state: Any, directory: str, *args: Any, **named: Any) -> Any:
        separate = deepcopy(state)
        items.clear()
        found = load(state, directory, *args, **named)
        own = sorted(items)
        items.clear()
        torch.testing.assert_close(
            tensors(load(separate, directory)), tensors(found), rtol=0.0, atol=0.0, equal_nan=True
        )
        loads.append({"directory": directory, "own": own, "alone": sorted(items)})
        return found

    FileSystemReader.read_data = read_noted
    dist_checkpointing.load = loaded
    _pretrain(args)
    Path("reads").mkdir(exist_ok=True)
    Path(f"reads/rank{args.rank}.json").write_text(json.dumps(loads))


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what a loaded state dict has of the model."""
    (model,) = [state[name] for name in ("model", "reference") if name in state]
    return {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}


def train() -> None:
    pretrain._pretrain = train_recorded
    pretrain.train()
