"""One rank of test_costs.py: FLOPs, collectives and kept bytes of the chunked and the dense head.

What the table in chunked.py says is counted in Megatron's own output layer and loss and in
loss_of_selected, run over the same layer, with and without sequence parallelism.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from megatron_slm import cpu_platform

cpu_platform.install()

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    layers,
    mappings,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor, distributed
from torch.utils.flop_counter import FlopCounterMode

from megatron_slm.loss import Selecting, chunked, loss_of_selected

SEQUENCE, BATCH, HIDDEN, VOCABULARY = 12, 2, 16, 64
TOKENS = SEQUENCE * BATCH
COLLECTIVES = """
    all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter
    reduce_scatter_tensor all_to_all all_to_all_single
""".split()
# Where they are called; Megatron has its own names for two of them.
CALLED = [(distributed, name) for name in COLLECTIVES] + [
    (module, name)
    for module in (layers, mappings)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func")
]


@contextmanager
def collectives() -> Iterator[list[tuple[Any, ...]]]:
    """Record the collectives called in the block: name, MAX if it is one, and each rank's shape."""
    calls: list[tuple[Any, ...]] = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in CALLED]

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            of_two = next((n for n in ("all_gather", "reduce_scatter") if n in name), None)
            second = args[1] if len(args) > 1 else kwargs.get("op")
            # A release of torch refuses to compare an operation with a tensor.
            is_maximum = not isinstance(second, Tensor) and second == distributed.ReduceOp.MAX
            given = args[1 if of_two else 0]
            calls.append((of_two or name, *(["MAX"] if is_maximum else []), tuple(given.shape)))
            return function(*args, **kwargs)

        return wrapper

    try:
        for owner, name, function in originals:
            setattr(owner, name, watched(name, function))
        yield calls
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def added_product(total: Any, left: Any, right: Any, **_: Any) -> int:
    """FLOPs of addmm_, given shapes."""
    return int(2 * left[0] * left[1] * right[1])


def measure(
    layer: torch.nn.Module, forward: Callable[[], Tensor]
) -> tuple[int, int, list[Any], list[Any]]:
    """FLOPs, bytes kept for the backward besides the weight, collectives forward and backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    in_place = {torch.ops.aten.addmm_: added_product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        with collectives() as before, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = forward()
        with collectives() as after:
            loss.backward()
    return flops.get_total_flops(), sum(kept.values()), before, after


def check(sequence_parallel: bool, entropies: bool, padding: int, top: bool = False) -> None:
    """Both heads' costs are those of the table."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    layer = ColumnParallelLinear(
        HIDDEN,
        VOCABULARY,
        config=TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            tensor_model_parallel_size=size,
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
        ),
        init_method=torch.nn.init.normal_,
        bias=False,
    )
    rows_here = SEQUENCE // size if sequence_parallel else SEQUENCE
    hidden = torch.randn(rows_here, BATCH, HIDDEN, requires_grad=True)
    tokens = VOCABULARY - padding
    labels = torch.randint(0, tokens, (BATCH, SEQUENCE), generator=torch.manual_seed(5))
    selected = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    selected[:, ::3] = True
    count = int(selected.sum())

    def run_chunked() -> Tensor:
        return loss_of_selected(
            hidden_states=hidden,
            output_layer=layer,
            output_weight=None,
            labels=labels,
            scale_logits=lambda logits: logits,
            config=SimpleNamespace(use_mup=False),
            context=Selecting(lambda *_, **__: selected, tokens, entropies, top_entropies=top),
        )

    def run_dense() -> Tensor:
        losses = vocab_parallel_cross_entropy(
            layer(hidden)[0], labels.t().contiguous(), tp_group=layer.tp_group
        )
        return losses.t()[selected].sum()

    product = HIDDEN * VOCABULARY // size
    gathered = ("all_gather", (rows_here, BATCH, HIDDEN))
    scattered = ("reduce_scatter", (SEQUENCE, BATCH, HIDDEN))

    flops, kept, before, after = measure(layer, run_chunked)
    assert flops == (2 * TOKENS + 6 * count) * product, flops
    assert kept == count * (4 * HIDDEN + 24), kept
    assert before == [
        *([gathered] if sequence_parallel else []),
        ("all_reduce", "MAX", (2 if padding else 1, TOKENS)),
        ("all_reduce", (2, TOKENS)),
        *[("all_reduce", (TOKENS,))] * (bool(padding) + entropies),
        *[("all_gather", (TOKENS, 20))] * top,
        ("broadcast", (1 + bool(padding) + entropies + top, TOKENS)),
    ], before
    assert after == [scattered if sequence_parallel else ("all_reduce", (count, HIDDEN))], after
    own_gradients = hidden.grad, layer.weight.grad

    hidden.grad = layer.weight.grad = None
    flops, kept, before, after = measure(layer, run_dense)
    assert flops == 6 * TOKENS * product, flops
    assert kept > 4 * TOKENS * VOCABULARY // size, kept
    tokens = (SEQUENCE, BATCH)
    assert before == [
        *([gathered] if sequence_parallel else []),
        ("all_reduce", "MAX", tokens),
        ("all_reduce", tokens),
        ("all_reduce", tokens),
    ], before
    assert after == (
        [gathered, scattered] if sequence_parallel else [("all_reduce", (*tokens, HIDDEN))]
    ), after
    for own, dense in zip(own_gradients, (hidden.grad, layer.weight.grad), strict=True):
        torch.testing.assert_close(own, dense, rtol=1e-5, atol=1e-6)


def main() -> None:
    """Every combination, in several chunks."""
    chunked.CHUNK_BYTES, chunked.MIN_COLUMNS = {"cpu": 0}, 10
    distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(distributed.get_world_size())
    model_parallel_cuda_manual_seed(1)
    for sequence_parallel in (False, True):
        for entropies in (False, True):
            for padding in (0, 7):
                torch.manual_seed(3)
                check(sequence_parallel, entropies, padding)
    check(True, True, 7, top=True)
    distributed.destroy_process_group()
    print("as stated")


if __name__ == "__main__":
    sys.exit(main())
