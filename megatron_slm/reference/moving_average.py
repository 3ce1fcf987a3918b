"""A reference that follows the policy: the exponential moving average of its weights.

Before each step, average = decay * average + (1 - decay) * policy.  This is computed in float32,
since bfloat16 would round away a thousandth of a difference, and the reference computes with the
average in the policy's type.  The average takes 4 bytes a parameter, besides the reference's own 2.

It is saved beside the policy's checkpoints, in SAVE/ema, and before these, so that every checkpoint
that can be resumed from has its average.  What is saved is an ordinary checkpoint, which can serve
other runs as a reference.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
    gpt_compatible_layer_maps,
    retarget_sharded_state_dict_to_gpt_checkpoint,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_slm.errors import UserError
from megatron_slm.files import write_whole
from megatron_slm.loss import Scoring
from megatron_slm.model.torch_dist import TRACKER
from megatron_slm.reference.checkpoint import open_checkpoint
from megatron_slm.reference.loading import load_parts, save_parts
from megatron_slm.reference.online import OnlineReference, build_model, unwrapped

DIRECTORY = "ema"


class MovingAverage(OnlineReference):
    """A reference that scores with the average of the policy's weights."""

    frozen = False

    def __init__(
        self,
        arguments: Namespace,
        scoring: Scoring,
        decay: float,
        layer_spec: Callable[..., Any] | None,
        resume: tuple[str, int] | None,
    ) -> None:
        """Build the reference, and load its average if the run resumes.

        Args:
            arguments: the reference's arguments, from frozen_arguments().
            scoring: what to compute.
            decay: the decay of the average, in (0, 1).
            layer_spec: the layers, as for the policy.
            resume: directory and iteration of the checkpoint that the policy resumes from; None if
                it starts afresh.  The average then starts with the policy's first weights.
        """
        super().__init__(build_model(arguments, layer_spec), arguments, scoring)
        self.arguments = arguments
        self.decay = decay
        self.average: list[Tensor] | None = None
        self.followed: int | None = None  # the last iteration that the average has taken in
        if resume is not None:
            directory, iteration = resume
            self.average = [
                _float_copy(weight) for weight in _weights(unwrapped(self.model)).values()
            ]
            self._load(Path(directory) / DIRECTORY, iteration)

    @torch.no_grad()
    def before_step(self, policy: Sequence[torch.nn.Module], iteration: int | None) -> None:
        """Take the policy's weights into the average, once for each iteration of training.

        Megatron may repeat an iteration to tell a hardware fault from a bug.

        Args:
            policy: the policy's model chunks, of which there is one.
            iteration: the step; None if it trains nothing.

        Raises:
            UserError: the policy's layers are cut otherwise than the reference's.
        """
        (chunk,) = unwrap_model(list(policy))
        theirs, own = _weights(chunk), _weights(unwrapped(self.model))
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
        for average, (name, weight) in zip(self.average, own.items(), strict=True):
            average.lerp_(theirs[name].float(), 1.0 - self.decay)
            weight.copy_(average)

    def save(self, directory: str, iteration: int) -> None:
        """Write the average to the sub-directory ema.  Collective over all ranks."""
        own = Path(directory) / DIRECTORY / f"iter_{iteration:07d}"
        first = torch.distributed.get_rank() == 0
        if first:
            own.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        # Megatron warns of arguments that differ between ranks.
        arguments = Namespace(**vars(self.arguments))
        for name in ("rank", "local_rank"):
            vars(arguments).pop(name, None)
        state = {"args": arguments, "iteration": iteration, "model": self._sharded(metadata)}
        save_parts(state, own, self.arguments)
        if first:
            write_whole(own.parent / TRACKER, str(iteration).encode())
            for old in own.parent.glob("iter_*"):
                if old != own and not (Path(directory) / old.name).exists():
                    shutil.rmtree(old, ignore_errors=True)  # like the policy's checkpoint
        torch.distributed.barrier()

    def _load(self, load: Path, iteration: int) -> None:
        flags = ("--slm-reference ema, resumed from --load: the average in", "--ckpt-step")
        checkpoint = open_checkpoint(str(load), iteration, flags)
        metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        own = _weights(unwrapped(self.model))
        wanted = self._sharded(metadata)
        pattern = self.arguments.hybrid_layer_pattern
        if pattern is not None and not checkpoint.architecture().get("hybrid_layer_pattern"):
            # Megatron has loaded the policy from the same GPT, in the same way.
            retarget_sharded_state_dict_to_gpt_checkpoint(
                wanted, gpt_compatible_layer_maps(pattern)
            )
        loaded = load_parts({"model": wanted}, checkpoint.directory, self.arguments)["model"]
        assert self.average is not None
        for average, (name, weight) in zip(self.average, own.items(), strict=True):
            average.copy_(loaded[name])
            weight.data.copy_(average)

    def _sharded(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the model's sharded state dict, with averages in place of its weights."""
        assert self.average is not None
        model = unwrapped(self.model)
        parts = model.sharded_state_dict(metadata=metadata)  # may move a router's bias to float32
        averages = {
            weight.data_ptr(): average
            for average, weight in zip(self.average, _weights(model).values(), strict=True)
        }
        sharded = {}
        for name, part in parts.items():
            if isinstance(part, ShardedTensor | ShardedTensorFactory):
                part.data = averages[part.data.data_ptr()]
                if isinstance(part, ShardedTensor):
                    part.dtype = torch.float32
                sharded[name] = part
        return sharded


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return what training changes of a model: its parameters, and the biases of its routers."""
    biases = {name: b for name, b in model.named_buffers() if name.endswith(".expert_bias")}
    return dict(model.named_parameters()) | biases


def _float_copy(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True)
