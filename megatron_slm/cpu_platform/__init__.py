"""The CPU platform: Megatron's own `pretrain()` on gloo, on a machine without a GPU.

Megatron 0.19 names CUDA in some 200 places (devices, streams, RNG, dtype checks).  Instead of
touching Megatron, `install()` makes those names mean the CPU:

    devices.py      torch's device="cuda", streams, events, memory statistics and barriers
    collectives.py  gloo's exchange of parts of different sizes, for experts
    rng.py          a generator of its own in place of the CUDA generator; initial weights by layer
    checkpoints.py  the writer of asynchronous saves, and copies of what it writes
    optimizer.py    Adam with the state layout of Apex's FusedAdam, so that checkpoints of the
                    distributed optimizer are saved, loaded and resharded as on a GPU

Nothing else in the package patches torch or Megatron for the platform's sake, and only entry points
import this package, when `torch.cuda.is_available()` is false.  `install()` must run before
`megatron.training` is imported; a second call does nothing.
"""

import os

# In place of Megatron's defaults that need a GPU: NCCL, and kernels of Apex or Transformer Engine.
ARGUMENT_DEFAULTS = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}

_installed = False


def installed() -> bool:
    """Tell whether this process runs on the CPU platform."""
    return _installed


def install() -> None:
    """Make CUDA's names mean the CPU in this process.  Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    # torch._dynamo and torch.compile read this when they are imported.  Megatron's jit_fuser is
    # torch.compile, and compiling each fused function costs minutes at start-up on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron requires it for tensor parallelism; on a CPU it has no meaning.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Dynamo tabulates torch's functions by identity when it is imported, as Megatron does: import
    # it before they are replaced.
    import torch._dynamo  # noqa: F401

    from megatron_slm.cpu_platform import checkpoints, collectives, devices, optimizer, rng

    devices.install()
    collectives.install()
    rng.install()
    optimizer.install()
    checkpoints.install()
