"""The head's losses and gradients against float64, selection against a sort, and attention.

    python tests/gpu/exactness.py [--device cpu] [--small]

Logits are rounded to the weights' type here as there, so what is compared is the arithmetic after
them.  Under compute-sanitizer (--tool memcheck), --small is enough.
"""

from __future__ import annotations

from table import arguments, attempt, row, skipped

args = arguments(__doc__)

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from by_sorting import top_of_sets
from megatron_slm.kernels import triton_kernels
from megatron_slm.loss import chunked, selected_loss, token_losses
from megatron_slm.model.layer_spec import GatheredAttention
from megatron_slm.selection import select_top_fraction

SIZES = (  # tokens, hidden, vocabulary, type
    (1, 64, 5, torch.float32),
    (37, 64, 1003, torch.float32),
    (37, 64, 1003, torch.bfloat16),
    (4099, 64, 2100, torch.bfloat16),
    (512, 256, 32000, torch.float32),
    (512, 256, 32000, torch.bfloat16),
    (64, 128, 128256, torch.bfloat16),
)
# A GPU's own chunks would hold each of these vocabularies as a whole.
chunked.CHUNK_BYTES["cuda"] = chunked.CHUNK_BYTES["cpu"]
KERNELS = ("megatron_slm.loss.softmax_triton", "megatron_slm.selection.top_fraction_triton")


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of what is exact."""
    return float((found.double() - exact).norm() / exact.norm())


def check_head(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Losses, entropies and both gradients, by main_grad as well."""
    group = parallel_state.get_tensor_model_parallel_group()
    hidden = torch.randn(tokens, width, device=args.device).to(dtype).requires_grad_()
    weight = 2.0 * torch.randn(vocabulary, width, device=args.device) / width**0.5
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=args.device)
    index = torch.arange(0, tokens, 2, device=args.device)
    scored = token_losses(
        hidden.detach(), weight.detach(), labels, group, entropies=True, top_entropies=True
    )

    def loss(fused: bool) -> Tensor:
        return selected_loss(
            hidden,
            weight,
            labels,
            scored,
            index,
            group,
            reduce_hidden_gradient=True,
            accumulate_into_main_grad=fused,
        )

    loss(False).backward()
    assert hidden.grad is not None and weight.grad is not None
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    weight.main_grad = torch.zeros(weight.shape, device=args.device)  # type: ignore[attr-defined]
    loss(True).backward()

    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden64 @ weight64.t()
    # A product of another size may be rounded otherwise.
    chunks = chunked._chunks(tokens, args.device, 0, vocabulary)
    rounded = torch.cat([hidden @ weight[columns].t() for columns in chunks], 1).double()
    logits = logits + (rounded - logits).detach()
    log_p = logits.log_softmax(-1)
    losses = -log_p.gather(1, labels[:, None]).squeeze(1)
    losses[index].sum().backward()
    assert hidden64.grad is not None and weight64.grad is not None
    assert scored.entropies is not None and scored.top_entropies is not None
    log_q = logits.topk(min(20, vocabulary)).values.log_softmax(-1)
    rough = 1e-5 if dtype == torch.float32 else 1e-2
    errors = {
        "losses": (relative(scored.losses, losses), 1e-5),
        "entropies": (relative(scored.entropies, -(log_p.exp() * log_p).sum(1)), 1e-4),
        "likeliest": (relative(scored.top_entropies, -(log_q.exp() * log_q).sum(1)), 1e-4),
        "dh": (relative(gradients[0], hidden64.grad), rough),
        "dW": (relative(gradients[1], weight64.grad), rough),
        "main_grad": (relative(weight.main_grad, weight64.grad), rough),  # type: ignore[attr-defined]
    }
    row(
        f"head n={tokens} h={width} v={vocabulary} {str(dtype)[6:]}: error",
        ", ".join(f"{name} {error:.0e}" for name, (error, _) in errors.items()),
        ", ".join(f"{limit:.0e}" for _, limit in errors.values()),
        all(error < limit for error, limit in errors.values()),
    )


def check_selection() -> None:
    """Of sizes that fill blocks and do not, with many ties, as a sort selects."""
    for samples, length, number in ((1, 7, 1), (4, 2048, 1), (3, 1000, 3), (16, 4097, 1)):
        scores = torch.randn(samples, length)
        for kind, values in (("", scores), (" with ties", (4 * scores).round())):
            valid = torch.rand(samples, length) > 0.05
            sets = torch.arange(samples) % number
            ratios = [0.6, 0.3, 1.0][:number]
            found = select_top_fraction(
                values.to(args.device), valid.to(args.device), ratios, sets.to(args.device)
            )
            expected = top_of_sets(values, valid, sets.tolist(), ratios)
            row(
                f"selection of {samples} x {length} tokens{kind}, {number} sets",
                f"{int(found.selected.sum())} selected",
                "as sorted",
                torch.equal(found.selected.cpu(), expected),
            )


def check_attention() -> None:
    """Check that a window that cuts nothing needs no mask, and others no [heads, s, s] scores."""
    length, heads, groups = (256, 4, 2) if args.small else (4096, 32, 8)
    peaks: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    shapes = ((length, 1, heads, 128), (length, 1, groups, 128), (length, 1, groups, 128))
    query, key, value = (
        torch.randn(shape, device=args.device, dtype=torch.bfloat16) for shape in shapes
    )
    for name, window in (("none", None), ("all", length - 1), ("half", length // 2)):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=heads * 128,
            num_attention_heads=heads,
            num_query_groups=groups,
            attention_dropout=0.0,
            window_size=None if window is None else (window, 0),
        )
        attention = GatheredAttention(config, 1, None, "self")
        attention(query, key, value, None)  # the mask, once for all layers
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs[name] = attention(query, key, value, None)
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    row(
        "attention, a window that cuts nothing",
        "as without",
        "",
        outputs["all"].equal(outputs["none"]),
    )
    scores = 4 * heads * length**2 / 2**20
    for name, peak in peaks.items():
        what = f"attention, s={length}, {heads} heads, window {name}: MiB at its peak"
        if args.device == "cpu":
            skipped(what, "memory is counted on a GPU")
        else:
            row(what, f"{peak:.0f}", f"< {scores / 4:.0f}, a quarter of scores", peak < scores / 4)


def main() -> None:
    """All of it."""
    backend = "nccl" if args.device == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    for name in KERNELS:
        if args.device == "cpu":
            skipped(name, "it is for a GPU; here the plain form is checked")
        else:
            module = triton_kernels(name, torch.device("cuda", torch.cuda.current_device()))
            row(name, "compiles" if module else "does not compile", "compiles", module is not None)
    for size in SIZES[:4] if args.small else SIZES:
        with attempt(f"head {size}"):
            check_head(*size)
    for check in (check_selection, check_attention):
        with attempt(check.__name__):
            check()


if __name__ == "__main__":
    main()
