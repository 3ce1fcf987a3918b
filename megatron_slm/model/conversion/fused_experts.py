"""Find each expert's tensors in files that have those of all experts of a layer in one.

That is how transformers 5 holds them in memory, and writes them if it is told not to keep the
original format: gate and up projections of all experts [experts, 2 * ffn, h], and down projections
[experts, h, ffn].  Mixtral's modules then also have other names.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture
from megatron_slm.model.conversion.safetensors_files import WeightOnDisk
from megatron_slm.model.families import FAMILIES


def separated(found: dict[str, WeightOnDisk], a: Architecture) -> dict[str, WeightOnDisk]:
    """Replace fused experts among a model's tensors by the tensors of each.

    Args:
        found: all tensors by name.
        a: the model's architecture.

    Raises:
        UserError: a fused tensor has another shape than by config.json, or the same weights are
            there under another name.
    """
    if a.experts is None:
        return found
    named, e = FAMILIES[a.family].mixtures, a.experts
    gate, up, down = named.gate_up_down
    result = dict(found)
    for layer in range(a.layers):
        before, after = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.{named.block}."
        fused = result.pop(f"{before}experts.gate_up_proj", None)
        downs = result.pop(f"{before}experts.down_proj", None)
        for tensor, shape in (
            (fused, (e.count, 2 * e.ffn, a.hidden)),
            (downs, (e.count, a.hidden, e.ffn)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise UserError(
                    f"{tensor.file}: {tensor.name} is {list(tensor.shape)}, and by config.json "
                    f"{list(shape)}"
                )
        for expert in range(e.count):
            rows = {
                gate: (fused, 0, e.ffn),
                up: (fused, e.ffn, 2 * e.ffn),
                down: (downs, 0, a.hidden),
            }
            for name, (tensor, start, stop) in rows.items():
                if tensor is not None:
                    own = f"{after}experts.{expert}.{name}.weight"
                    _check_alone(tensor, found.get(own))
                    result[own] = replace(
                        tensor,
                        shape=(stop - start, tensor.shape[2]),
                        part=(expert, slice(start, stop)),
                    )
        router = result.pop(f"{before}gate.weight", None)
        if router is not None:
            _check_alone(router, result.get(f"{after}gate.weight"))
            result[f"{after}gate.weight"] = router
    return result


def _check_alone(tensor: WeightOnDisk, other: WeightOnDisk | None) -> None:
    """Check that a tensor's weights are not in another tensor as well."""
    if other is not None:
        raise UserError(
            f"{tensor.file}: {tensor.name}, and {other.name} of {other.file}, are the same weights "
            "in two forms; remove one of them"
        )
