"""Time and memory of the selective head on a GPU, beside Megatron's dense head and its peers.

    python tests/gpu/head.py [--device cpu --small]

Output layer and loss, forward and backward, bfloat16, 60% of the tokens selected.  Liger and cut
cross entropy (where installed) are given the same 60% by their ignored label.  The ceiling is what
the card itself reaches in a product of 8192 x 8192 matrices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from table import arguments, attempt, measured, row, skipped

args = arguments(__doc__)

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_slm.loss import chunked, selected_loss, token_losses
from megatron_slm.selection import select_top_fraction

GPU = args.device == "cuda"
ROUNDS = 3 if args.small else 12
GIB = 2**30


def measure(
    step: Callable[[], object], prepare: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Median milliseconds, and GiB above what is there before, when `prepare` has been called."""
    for _ in range(3):
        prepare()
        step()
    prepare()
    times, before = [], 0
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(ROUNDS):
        prepare()
        start = time.perf_counter()
        step()
        if GPU:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / GIB


def peers(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Other heads that keep no logits; labels of -100 are ignored."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )
    except ImportError:
        skipped("Liger's fused linear cross entropy", "liger-kernel is not installed")
    else:

        def liger() -> None:
            out = Liger.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")
            (out[0] if isinstance(out, tuple) else out).backward()

        yield "Liger", liger
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        skipped("cut cross entropy", "cut-cross-entropy is not installed")
    else:
        yield (
            "cut cross entropy",
            lambda: linear_cross_entropy(hidden, weight, labels, reduction="sum").backward(),
        )


def selective(hidden: Tensor, weight: Tensor, labels: Tensor, index: Tensor) -> None:
    """Losses of all tokens, and the gradients of those at `index`."""
    group = parallel_state.get_tensor_model_parallel_group()
    scored = token_losses(hidden.detach(), weight.detach(), labels, group)
    selected_loss(
        hidden, weight, labels, scored, index, group, reduce_hidden_gradient=True
    ).backward()


def compare(tokens: int, width: int, vocabulary: int, ceiling: float) -> None:
    """Each head's time, memory and part of the ceiling; ours against the dense one's."""
    group = parallel_state.get_tensor_model_parallel_group()
    hidden = torch.randn(tokens, width, device=args.device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device=args.device, dtype=torch.bfloat16) / width**0.5
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=args.device)
    index = (torch.rand(tokens, device=args.device) < 0.6).nonzero().squeeze(1)
    ignored = torch.full_like(labels, -100).index_copy_(0, index, labels[index])

    def dense() -> None:
        logits = (hidden @ weight.t())[:, None]
        losses = vocab_parallel_cross_entropy(logits, labels[:, None], tp_group=group)
        losses.flatten()[index].sum().backward()

    def without_gradients() -> None:
        hidden.grad = weight.grad = None

    product = tokens * width * vocabulary
    of = f"head n={tokens} h={width} v={vocabulary}"
    found: dict[str, tuple[float, float]] = {}
    for name, step in (
        ("dense", dense),
        ("chunked", lambda: selective(hidden, weight, labels, index)),
        *peers(hidden, weight, ignored),
    ):
        with attempt(f"{of}, {name}"):
            try:
                found[name] = measure(step, without_gradients)
            except torch.OutOfMemoryError:
                skipped(f"{of}, {name}", "out of memory")
        without_gradients()
        if GPU:
            torch.cuda.empty_cache()
        if name not in found:
            continue
        milliseconds, peak = found[name]
        flops = (
            (2 * tokens + 6 * len(index)) * width * vocabulary if name == "chunked" else 6 * product
        )
        share = flops / (milliseconds / 1000) / ceiling
        row(f"{of}, {name}", f"{milliseconds:.2f} ms, {peak:.2f} GiB, {share:.0%} of the ceiling")
    milliseconds, peak = found["chunked"]
    if "dense" in found:
        time_, memory = found["dense"]
        measured(
            f"{of}: time / dense",
            f"{milliseconds / time_:.2f}",
            "0.90",
            milliseconds <= 0.9 * time_,
        )
        if GPU:
            own = weight.nbytes / GIB  # of the gradient, which both have and DDP keeps elsewhere
            ratio = (peak - own) / (memory - own)
            measured(
                f"{of}: memory / dense, without dW", f"{ratio:.3f}", "0.125", 0 < ratio <= 0.125
            )
    for name in found.keys() - {"dense", "chunked"}:
        ratio = milliseconds / found[name][0]
        measured(f"{of}: time / {name}", f"{ratio:.2f}", "1.00", ratio <= 1.0)
    if GPU and tokens == 65536:
        measured(f"{of}: GiB with dW", f"{peak:.2f}", "2.5", peak <= 2.5)


def compare_chunks(tokens: int, width: int, vocabulary: int) -> None:
    """How large a chunk should be, which is a constant of chunked.py."""
    kept = dict(chunked.CHUNK_BYTES)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden = torch.randn(tokens, width, device=args.device, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device=args.device, dtype=torch.bfloat16) / width**0.5
    trained = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    labels = torch.randint(0, vocabulary, (tokens,), device=args.device)
    index = torch.arange(0, tokens * 6 // 10, device=args.device)

    def without_gradients() -> None:
        for each in trained:
            each.grad = None

    try:
        for mib in (32, 64, 128, 256):
            chunked.CHUNK_BYTES[args.device] = mib << 20
            for what, step in (
                ("losses alone", lambda: token_losses(hidden, weight, labels, group)),
                ("with gradients of 60%", lambda: selective(*trained, labels, index)),
            ):
                time_, peak = measure(step, without_gradients)
                row(f"{what}, chunks of {mib} MiB", f"{time_:.2f} ms, {peak:.2f} GiB")
    finally:
        chunked.CHUNK_BYTES.update(kept)


def time_selection(tokens: int) -> None:
    """Beside torch.topk, which is told k and breaks ties as it likes."""
    scores = torch.randn(4, tokens // 4, device=args.device)
    valid = torch.rand(4, tokens // 4, device=args.device) > 0.05
    own, _ = measure(lambda: select_top_fraction(scores, valid, [0.6]))
    most = int(0.57 * tokens)
    topk, _ = measure(lambda: torch.where(valid, scores, -torch.inf).flatten().topk(most))
    row(f"selection of {tokens} tokens", f"{own:.3f} ms, torch.topk {topk:.3f} ms")


def main() -> None:
    """All sizes."""
    store = torch.distributed.HashStore()
    backend = "nccl" if GPU else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    size = 512 if args.small else 8192
    left, right = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in "ab")
    ceiling = 2 * size**3 / measure(lambda: left @ right)[0] * 1000
    row("ceiling, a bfloat16 product", f"{ceiling / 1e12:.3g} TFLOP/s")
    if args.small:
        time_selection(4096)
        compare_chunks(256, 64, 4096)
        compare(256, 64, 1000, ceiling)
        return
    for tokens in (8192, 131072):
        with attempt(f"selection of {tokens} tokens"):
            time_selection(tokens)
    with attempt("losses alone, by chunk"):
        compare_chunks(8192, 4096, 128256)
    for sizes in ((8192, 4096, 32000), (8192, 4096, 128256), (65536, 4096, 62000)):
        with attempt(f"head {sizes}"):
            compare(*sizes, ceiling)


if __name__ == "__main__":
    main()
