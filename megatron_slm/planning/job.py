"""Describe a job for the formulas: how its ranks are grouped, what a step does, who scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_slm.model.architecture import Architecture

FLOAT32 = 4  # bytes per value of what is float32 whatever the weights are


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    vp: int = 1
    """Virtual pipeline stages of a rank; 1 without interleaving."""
    cp: int = 1
    """Context-parallel size."""
    dp: int = 1
    """Data-parallel size."""
    ep: int = 1
    """Expert-parallel size: the ranks that share out the experts."""
    etp: int = 1
    """Expert-tensor-parallel size: the ranks that split an expert."""
    sequence_parallel: bool = False
    """Whether norms are split over the tensor-parallel ranks."""
    distributed_optimizer: bool = False
    """Whether optimizer states are sharded over the ranks that have the same parameters."""
    optimizer_instances: int = 1
    """Number of groups of these ranks, in each of which all optimizer states are held."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Number of ranks that have the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)


@dataclass(frozen=True)
class Work:
    """What a step does."""

    sequence: int
    """Tokens of a sample."""
    micro_batch: int
    """Samples of a micro-batch."""
    global_batch: int
    """Samples of a step."""
    padded_vocabulary: int
    """Size of the vocabulary with Megatron's padding."""
    ratio: float = 1.0
    """Token selection ratio."""
    ranks_first: bool = False
    """Whether a forward pass of the policy precedes the step, to rank the global batch's tokens."""
    head: Literal["dense", "chunked"] = "chunked"
    """How the output layer and the loss are computed."""
    backward: Literal["all", "selected"] = "all"
    """The tokens that the layers' backward passes go through."""
    weight_bytes: int = 2
    """Bytes of a weight."""
    gradient_bytes: int = 4
    """Bytes of a parameter's gradient."""
    optimizer_bytes: int = 12
    """Bytes of a parameter's optimizer states."""
    kernels: Literal["plain", "te"] = "te"
    """Whether the layers are plain torch or Transformer Engine's."""
    fused_gradients: bool = True
    """Whether weight gradients are computed directly in their buffer."""
    recompute: int = 0
    """Number of layers whose activations are recomputed together; 0 for none."""
    recomputed: float = 1.0
    """Share of a stage's layers that this applies to, the first ones; the others keep theirs."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Device, which decides the size of the chunked head's chunks."""
    document: float | None = None
    """Mean length of a document over its tokens; None where documents see each other."""

    @property
    def run_again(self) -> float:
        """Share of the layers that run forward again during the backward pass."""
        return self.recomputed if self.recompute else 0.0

    def micro_batches(self, layout: Layout) -> int:
        """Return the number of micro-batches of a step on each rank."""
        return self.global_batch // (self.micro_batch * layout.dp)

    def tokens(self, layout: Layout) -> int:
        """Return n, the number of a micro-batch's tokens on each rank."""
        return self.sequence * self.micro_batch // layout.cp


@dataclass(frozen=True)
class ReferenceModel:
    """A reference model that scores on the policy's ranks."""

    architecture: Architecture
    """The model's sizes."""
    parameter_bytes: int
    """Bytes that a rank holds for each of its parameters."""
    streamed: bool = False
    """Whether layers stay in host memory, with two at a time on the device."""
    where: str = ""
    """Where the model comes from, in words."""
