"""Time that the CPU platform's wrappers add to a training step.

    python tests/benchmarks/platform_overhead.py

One GPT of hidden size 256, forward, backward and optimizer in one process: with the platform's
wrappers around torch's functions, and with torch's own functions put back.  (What remains of the
platform then, such as a stream that does nothing, has no counterpart that could be timed.)  The two
alternate; the ratio is of medians.
"""

from __future__ import annotations

import os
import statistics
import time

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}

from megatron_slm import cpu_platform

cpu_platform.install()

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_slm.cpu_platform.devices import FACTORIES, TENSOR_FACTORIES
from megatron_slm.cpu_platform.optimizer import FusedAdam
from megatron_slm.model.layer_spec import plain_block_spec

LAYERS, HIDDEN, SEQUENCE, MICRO_BATCH, VOCABULARY = 4, 256, 256, 2, 4096
ROUNDS = 40


def wrappers() -> list[tuple[object, str]]:
    """Functions of torch that the platform wraps and a step calls."""
    methods = (torch.Tensor, torch.nn.Module)
    return [
        *((torch, name) for name in FACTORIES),
        *((torch.Tensor, name) for name in TENSOR_FACTORIES),
        *((owner, "to") for owner in methods),
        (torch.Tensor, "type"),
        (torch.nn.functional, "dropout"),
    ]


def main() -> None:
    """Print the ratio, and how often a step goes through a wrapper."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config,
        plain_block_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    optimizer = FusedAdam(model.parameters())
    tokens = torch.randint(0, VOCABULARY, (MICRO_BATCH, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)

    def step() -> float:
        start = time.perf_counter()
        model(tokens, positions, None, labels=tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    wrapped = {(owner, name): getattr(owner, name) for owner, name in wrappers()}
    times: dict[str, list[float]] = {"platform": [], "torch": []}
    for number in range(2 * ROUNDS + 4):
        kind = ("platform", "torch")[number % 2]
        for (owner, name), function in wrapped.items():
            setattr(owner, name, function if kind == "platform" else function.__wrapped__)
        seconds = step()
        if number >= 4:
            times[kind].append(seconds)
    platform_time, torch_time = (statistics.median(times[k]) for k in ("platform", "torch"))
    print(
        f"step with the platform {1e3 * platform_time:.2f} ms, with torch's own functions "
        f"{1e3 * torch_time:.2f} ms: {platform_time / torch_time:.3f} (hidden {HIDDEN}, "
        f"{LAYERS} layers, {MICRO_BATCH} x {SEQUENCE} tokens, one thread)"
    )


if __name__ == "__main__":
    main()
