"""The CPU platform: Megatron's own `pretrain()` on gloo, on a machine without a GPU.

Megatron 0.19 names CUDA in some 200 places (devices, streams, RNG, dtype checks).  Instead of
touching Megatron, `install()` makes those names mean the CPU:

    devices.py    torch: device="cuda", streams, events, memory statistics, barriers -> CPU
    rng.py        a generator of its own behind "the CUDA RNG"; layer-wise initial weights
    checkpoints.py  a writer of asynchronous saves, and copies of what it writes
    optimizer.py  Adam with the state layout of Apex's FusedAdam, so that distributed-optimizer
                  checkpoints save, load and reshard as they do on a GPU

Nothing else in the package patches torch or Megatron for the platform's sake, and only entry
points import this one, when `torch.cuda.is_available()` is false.  `install()` must run before
`megatron.training` is imported; a second call does nothing.
"""

import os

# Defaults of Megatron's arguments that mean a GPU: NCCL, kernels of Apex or Transformer Engine.
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


def install() -> None:
    """Redirect CUDA to the CPU in this process.  Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    # Read by torch._dynamo and by torch.compile at import: Megatron's jit_fuser is torch.compile,
    # and a C++ compilation per fused function costs minutes at start-up on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron asks for it with tensor parallelism; it has no meaning on a CPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Dynamo tabulates torch's functions by identity when first imported, and Megatron imports it.
    import torch._dynamo  # noqa: F401

    from megatron_slm.cpu_platform import checkpoints, devices, optimizer, rng

    devices.install()
    rng.install()
    optimizer.install()
    checkpoints.install()
