"""megatron_slm.pretrain, and what a step took, in measured<rank>.json.

flops: of the first step, counted by torch.
sent: bytes that the first step sends to other ranks in all-to-alls.
states: bytes of weights, gradients and optimizer state, by walking them.
moment: what the second step took on top of what was there when it began, by the kernel's account.
"""

from __future__ import annotations

import ctypes
import gc
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_slm import pretrain
from resident import resident

train = pretrain._pretrain
libc = ctypes.CDLL("libc.so.6")
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of mallopt


def addmm_flops(out: Any, a: list[int], b: list[int], *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def attention_flops(query: list[int], key: list[int], *args: Any, **kwargs: Any) -> int:
    """Return those of two products; query, key: [b, heads, s, d]."""
    b, heads, s, d = query
    return 2 * 2 * b * heads * s * key[-2] * d


def attention_backward_flops(
    grad: list[int], query: list[int], key: list[int], *args: Any, **kwargs: Any
) -> int:
    """Return those of five products: scores are not kept."""
    return 5 * attention_flops(query, key) // 2


# What torch's counter leaves out, in some or all releases.
MORE = {
    torch.ops.aten.addmm_: addmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def tensors_of(model: list[Any], optimizer: Any, reference: Any) -> Iterator[torch.Tensor]:
    for chunk in model:
        yield from chunk.parameters()
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield from (t for t in (buffer.param_data, buffer.grad_data) if t is not None)
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    if reference is not None:
        yield from reference.model.parameters()


def train_measured(args: Namespace) -> None:
    from megatron.training import training

    from megatron_slm.reference import online

    kept: dict[str, Any] = {"reference": None}
    measured: dict[str, int] = {}
    setup, step = training.setup_model_and_optimizer, training.train_step
    all_to_all, sent = torch.distributed.all_to_all_single, []
    build = online.OnlineReference.__init__

    def setup_kept(*args: Any, **kwargs: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **kwargs)
        kept["model"], kept["optimizer"] = model, optimizer
        return model, optimizer, scheduler

    def build_kept(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        kept["reference"] = self

    def all_to_all_counted(output: Any, input: Any, *args: Any, **named: Any) -> Any:
        splits = list(named["input_split_sizes"])
        splits[torch.distributed.get_rank(named["group"])] = 0
        sent.append(int(sum(splits)) * input[0].nbytes)
        return all_to_all(output, input, *args, **named)

    def step_measured(*args: Any, **kwargs: Any) -> Any:
        if not measured:
            with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
                result = step(*args, **kwargs)
            measured["flops"], measured["sent"] = counter.get_total_flops(), sum(sent)
            return result
        gc.collect()
        libc.malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        result = step(*args, **kwargs)
        measured["moment"] = resident("VmHWM") - before
        return result

    torch.distributed.all_to_all_single = all_to_all_counted
    training.setup_model_and_optimizer = setup_kept
    training.train_step = step_measured
    online.OnlineReference.__init__ = build_kept
    train(args)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors_of(**kept)
    }
    measured["states"] = sum(held.values())
    Path(f"measured{args.rank}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    # Tensors of 64 KiB and more are mapped one by one, and unmapped when freed.
    libc.mallopt(MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(TRIM_THRESHOLD, 1 << 16)
    pretrain._pretrain = train_measured
    pretrain.main()
