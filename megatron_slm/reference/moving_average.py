"""A reference that follows the policy: the exponential moving average of its weights.

Before each step average = decay * average + (1 - decay) * policy, in float32 (in bfloat16 a
thousandth of a difference would be rounded away), and the reference computes with the average in
the policy's type.  It costs 4 bytes a parameter beside the reference's own 2.

Saved beside the policy's checkpoints, in SAVE/ema, before these: a checkpoint that can be resumed
from has its average.  What is saved is an ordinary checkpoint, of use as a reference to other runs.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.files import write_whole
from megatron_slm.loss import Scoring
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.reference.checkpoint import open_checkpoint
from megatron_slm.reference.online import OnlineReference, build_model, gpt

DIRECTORY = "ema"


class MovingAverage(OnlineReference):
    """Scores with the average of the policy's weights.

    Args:
        arguments: its own, from frozen_arguments().
        decay: in (0, 1).
        layer_spec: as for the policy.
        resume: directory and iteration of the policy's checkpoint; None where it starts afresh, and
            the average with the policy's weights at the first step.
    """

    frozen = False

    def __init__(
        self,
        arguments: Namespace,
        scoring: Scoring,
        decay: float,
        layer_spec: Callable[..., Any] | None,
        resume: tuple[str, int] | None,
    ) -> None:
        super().__init__(build_model(arguments, layer_spec), arguments, scoring)
        self.arguments = arguments
        self.decay = decay
        self.average: list[Tensor] | None = None
        self.followed: int | None = None  # the last iteration
        if resume is not None:
            directory, iteration = resume
            self.average = [_float_copy(parameter) for parameter in self.model.parameters()]
            self._load(Path(directory) / DIRECTORY, iteration)

    @torch.no_grad()
    def before_step(self, policy: Sequence[torch.nn.Module], iteration: int | None) -> None:
        """Take the policy's weights into the average: once for each iteration of training, which
        Megatron's rerun machinery may repeat.

        Raises:
            UserError: the policy's layers are not cut as the reference's.
        """
        (chunk,) = unwrap_model(list(policy))
        theirs = dict(chunk.named_parameters())
        own = dict(gpt(self.model).named_parameters())
        if {name: p.shape for name, p in own.items()} != {n: p.shape for n, p in theirs.items()}:
            raise UserError(
                "--slm-reference ema needs a policy with the same number of layers on each "
                "pipeline stage"
            )
        if self.average is None:
            self.average = [_float_copy(theirs[name]) for name in own]
        elif iteration in (None, self.followed):
            return
        self.followed = iteration
        for average, (name, parameter) in zip(self.average, own.items(), strict=True):
            average.lerp_(theirs[name].float(), 1.0 - self.decay)
            parameter.copy_(average)

    def save(self, directory: str, iteration: int) -> None:
        """Write the average to DIRECTORY/ema.  Collective over all ranks."""
        own = Path(directory) / DIRECTORY / f"iter_{iteration:07d}"
        first = torch.distributed.get_rank() == 0
        if first:
            own.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        # Megatron warns of what differs between ranks.
        arguments = Namespace(**vars(self.arguments))
        for name in ("rank", "local_rank"):
            vars(arguments).pop(name, None)
        state = {"args": arguments, "iteration": iteration, "model": self._sharded(metadata)}
        dist_checkpointing.save(state, str(own))
        if first:
            write_whole(own.parent / TRACKER, str(iteration).encode())
            for old in own.parent.glob("iter_*"):
                if old != own and not (Path(directory) / old.name).exists():
                    shutil.rmtree(old, ignore_errors=True)  # the policy's is gone as well
        torch.distributed.barrier()

    def _load(self, load: Path, iteration: int) -> None:
        flags = ("--slm-reference ema, resumed from --load: the average in", "--ckpt-step")
        directory = str(open_checkpoint(str(load), iteration, flags).directory)
        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        own = gpt(self.model)
        loaded = dist_checkpointing.load({"model": self._sharded(metadata)}, directory)["model"]
        assert self.average is not None
        for average, (name, parameter) in zip(self.average, own.named_parameters(), strict=True):
            average.copy_(loaded[name])
            parameter.data.copy_(average)

    def _sharded(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The model's sharded state dict, with the averages for its parameters."""
        assert self.average is not None
        model: GPTModel = gpt(self.model)
        averages = {
            parameter.data_ptr(): average
            for average, parameter in zip(self.average, model.parameters(), strict=True)
        }
        sharded = {}
        for name, part in model.sharded_state_dict(metadata=metadata).items():
            if isinstance(part, ShardedTensor | ShardedTensorFactory):
                part.data = averages[part.data.data_ptr()]
                if isinstance(part, ShardedTensor):
                    part.dtype = torch.float32
                sharded[name] = part
        return sharded


def _float_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.float32, copy=True)
