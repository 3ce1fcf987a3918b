"""Time and memory of the selective head over those of Megatron's dense head.

    python tests/benchmarks/head.py [--rounds 5] [--threads 2]

Output layer and loss, forward and backward, one rank: all 4096 tokens' losses and the gradients of
60% of them, against ColumnParallelLinear and vocab_parallel_cross_entropy, whose loss is masked.
Both are given the same 60%.  "padded" is the selective head where the last columns are padding, so
that it computes losses with and without; where there is none it is "chunked".

Time: the heads alternate in one process; ratios of the medians and of the fastest rounds.  Where
other processes want the cores, the many small steps of chunks wait more often for a thread that
lost its core; --threads 1 is free of that.
Memory: how far the resident set of a fresh process rises, at its highest, above what it was before
the forward (hidden states, weight and labels are there already; gradients, which the step leaves
behind, count).  The weight's gradient is as large for both heads and with DDP has its place
elsewhere, so the ratio is printed with and without it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent)]
os.environ["LOCAL_RANK"] = "0"

from megatron_slm import cpu_platform

cpu_platform.install()

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_slm.loss import selected_loss, token_losses
from resident import resident

TOKENS, HIDDEN, VOCABULARY, RATIO = 4096, 1024, 32000, 0.6
PADDING = 100
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADS = ("dense", "chunked", "padded")
MIB = 1 << 20


def start_megatron() -> None:
    """One rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def make_step(
    dtype: torch.dtype, tokens: int = TOKENS, vocabulary: int = VOCABULARY
) -> Callable[[str], None]:
    """Return a function that runs the forward and backward pass of a head, given its name."""
    layer = ColumnParallelLinear(
        HIDDEN,
        vocabulary,
        config=TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=8,
            params_dtype=dtype,
            use_cpu_initialization=True,
        ),
        init_method=lambda weight: torch.nn.init.normal_(weight, std=0.02),
        bias=False,
    )
    hidden = torch.randn(tokens, 1, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary - PADDING, (tokens, 1))
    index = (torch.rand(tokens) < RATIO).nonzero().squeeze(1)

    def dense() -> None:
        # In a function, as in GPTModel: nothing but the graph holds the logits.
        losses = vocab_parallel_cross_entropy(layer(hidden)[0], labels, tp_group=layer.tp_group)
        losses.flatten()[index].sum().backward()

    def chunked(unpadded: int | None = None) -> None:
        rows, weight, group = hidden.flatten(0, 1), layer.weight, layer.tp_group
        scored = token_losses(
            rows.detach(),
            weight.detach(),
            labels.flatten(),
            group,
            vocabulary=unpadded,
            with_padding=True,
        )
        selected_loss(
            rows, weight, labels.flatten(), scored, index, group, reduce_hidden_gradient=True
        ).backward()

    def padded() -> None:
        chunked(vocabulary - PADDING)

    def step(head: str) -> None:
        hidden.grad = layer.weight.grad = None
        {"dense": dense, "chunked": chunked, "padded": padded}[head]()

    return step


def print_memory(head: str, dtype: torch.dtype) -> None:
    """How far a first step raises the resident set."""
    step = make_step(dtype)
    # What the libraries need once: code, threads, buffers.
    make_step(dtype, tokens=64, vocabulary=1024)(head)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(head)
    print(resident("VmHWM") - before)


def print_times(dtype: torch.dtype, rounds: int) -> None:
    """Seconds of each round's steps, one head a line."""
    step = make_step(dtype)
    times: dict[str, list[float]] = {head: [] for head in HEADS}
    for number in range(rounds + 1):
        for head in HEADS:
            start = time.perf_counter()
            step(head)
            if number > 0:
                times[head].append(time.perf_counter() - start)
    for head in HEADS:
        print(*times[head])


def main() -> None:
    """Print both ratios for each type."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        start_megatron()
        what, name = args.measure
        if what == "time":
            print_times(TYPES[name], args.rounds)
        else:
            print_memory(what, TYPES[name])
        return

    def measure(what: str, name: str) -> list[list[float]]:
        command = [sys.executable, __file__, "--rounds", str(args.rounds)]
        command += ["--threads", str(args.threads), "--measure", what, name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return [[float(word) for word in line.split()] for line in output.splitlines()]

    for name, dtype in TYPES.items():
        times = measure("time", name)
        for what, of_rounds in (("median", statistics.median), ("fastest", min)):
            dense, chunked, padded = (of_rounds(seconds) for seconds in times)
            print(f"{name}: {what} {chunked:.3f} s, dense {dense:.3f} s: {chunked / dense:.3f}")
            print(f"{name}: {what} padded {padded:.3f} s: {padded / chunked:.3f} of chunked")
        weight = VOCABULARY * HIDDEN * dtype.itemsize
        peak = {head: measure(head, name)[0][0] for head in HEADS[:2]}
        for what, less in (("with", 0), ("without", weight)):
            ours, theirs = ((peak[head] - less) / MIB for head in ("chunked", "dense"))
            print(
                f"{name}: peak memory {what} the weight's gradient {ours:.0f} MiB, "
                f"dense {theirs:.0f} MiB: {ours / theirs:.3f}"
            )


if __name__ == "__main__":
    main()
