"""Plain layers whose backward pass costs what is selected (--slm-backward selected).

In each layer, the hidden states of tokens that do not count are constants.  The gradient is that of
the loss of the selected tokens under this definition: their queries, projections and MLP, and their
keys and values, get gradients; keys and values of other tokens are read and get none.

forward     runs a layer without a graph, and keeps its input, keys and values, and, unless
            activations are recomputed, the products of its linear layers
backward    gathers the rows that count of all this (selected_rows.py), runs the layer on them with
            a graph, in which kept products are not computed again, and differentiates that

For a fraction k of the tokens, against a forward pass of one: 1 + 2k for the linear layers, and
1 + 3k if activations are recomputed, in the place of 3 and 4; attention computes its products for
the rows that count a second time, in the place of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_slm.model.documents import PackedForPlainLayers, SeparateDocuments
from megatron_slm.model.layer_spec import GatheredAttention, GatherSequence, plain_block_spec
from megatron_slm.model.selected_rows import SelectedRows, Sharing

PRODUCTS = 4  # of a layer: queries, keys and values; attention's output; and two of the MLP
PRODUCT = torch.ops.aten.mm.default


def use_selected_layers(config: Any) -> None:
    """Give a model layers whose backward pass costs what is selected.

    They take over the recomputation of activations, if the configuration asks for it.

    Args:
        config: the model's GPTModelConfig; changed in place.
    """
    transformer = config.transformer
    recomputes = transformer.recompute_granularity is not None
    transformer.recompute_granularity = transformer.recompute_method = None
    transformer.recompute_num_layers = None
    config.transformer_layer_spec = partial(_block_spec, recomputes)


def _block_spec(
    recomputes: bool, config: Any, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    block = plain_block_spec(config, vp_stage)
    shared = _Shared()
    for layer in block.layer_specs:
        layer.module = SelectedLayer
        layer.params = {"shared": shared, "recomputes": recomputes}
        layer.submodules.self_attention.submodules.core_attention = _RowAttention
    return block


class _Pass:
    """What the layers of a model chunk know of one micro-batch."""

    def __init__(self) -> None:
        self.rows: SelectedRows | None = None
        """The rows that count, found by the first backward pass, which is the last layer's."""


class _Shared:
    """What the layers of a model chunk share."""

    def __init__(self) -> None:
        self.layers = 0
        self.current = _Pass()  # of the micro-batch that runs forward


class _OfRows:
    """What attention is told of the rows of one layer: packed sequence parameters, to Megatron."""

    qkv_format = None

    def __init__(self, rows: SelectedRows, key: Tensor, value: Tensor) -> None:
        self.rows, self.key, self.value = rows, key, value

    @property
    def separate(self) -> _OfRows:
        """What core attention gets."""
        return self

    def rotary(self, table: Tensor, _: Any) -> Tensor:
        return self.rows.rotary(table)


class _RowAttention(GatheredAttention):
    """Attention that keeps its keys and values, or in which rows attend to kept ones."""

    kept: list[Tensor] | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SeparateDocuments | _OfRows | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if isinstance(packed_seq_params, _OfRows):
            return self._of_rows(query, key, value, packed_seq_params)
        if self.kept is not None:
            self.kept += [key, value]
        return super().forward(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params
        )

    def _of_rows(self, query: Tensor, key: Tensor, value: Tensor, kept: _OfRows) -> Tensor:
        """Attend from the rows' queries, [k, 1, heads/t, d], to the keys of all tokens."""
        rows = kept.rows
        all_keys, all_values = (
            whole.flatten(0, 1).index_copy(0, rows.rows, own[: rows.count, 0]).view_as(whole)
            for whole, own in ((kept.key, key), (kept.value, value))
        )
        if self.cp_group.size() > 1:
            all_keys, all_values = (
                GatherSequence.apply(whole, self.cp_group) for whole in (all_keys, all_values)
            )
        left = self._window_over(len(all_keys))
        contexts = []
        of_samples = query[: rows.count, 0].split(rows.counts)
        for sample, of_sample in enumerate(rows.queries(left, query.dtype)):
            keys, values = (whole[:, sample].transpose(0, 1) for whole in (all_keys, all_values))
            at = 0
            for block in of_sample:
                own = of_samples[sample][at : at + len(block.mask)].transpose(0, 1)
                seen = slice(block.first, block.last)
                context = self._masked(
                    own[None], keys[None, :, seen], values[None, :, seen], block.mask
                )
                contexts.append(context[0].transpose(0, 1).flatten(1))
                at += len(block.mask)
        if not contexts:  # the graph has to reach the keys, whose gradients ranks add up
            nothing = (all_keys.sum() + all_values.sum()) * 0
            contexts = [query[:0, 0].flatten(1) + nothing]
        return pad(torch.cat(contexts), (0, 0, 0, len(query) - rows.count))[:, None]


class SelectedLayer(TransformerLayer):
    """A plain layer whose backward pass costs what is selected."""

    def __init__(self, *args: Any, shared: _Shared, recomputes: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.whole = True
        """Whether the backward pass of the coming step is through all tokens."""
        self.recomputes = recomputes
        self.shared = shared
        self.is_first = shared.layers == 0
        shared.layers += 1
        self.sharing = Sharing(
            self.pg_collection.tp, self.pg_collection.cp, self.config.sequence_parallel
        )

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, None]:
        """Run as any layer does; only the backward pass differs.

        Args:
            hidden_states: [s/c, b, h], or [s/c/t, b, h] with sequence parallelism.
            inputs: what else TransformerBlock gives a layer.
        """
        trains = self.training and torch.is_grad_enabled()
        if not trains or (self.whole and not self.recomputes):
            return self.run(hidden_states, inputs), None
        if self.is_first:
            self.shared.current = _Pass()
        if not hidden_states.requires_grad:  # what precedes is frozen, and these weights may not be
            hidden_states = hidden_states.detach().requires_grad_()
        return _RunLayer.apply(hidden_states, self, inputs, self.shared.current), None

    def run(self, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return Megatron's layer of hidden states."""
        output: Tensor
        output, _ = super().forward(hidden_states=hidden_states, **inputs)
        return output


class _RunLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: SelectedLayer, inputs: dict[str, Any], own: _Pass
    ) -> Tensor:
        ctx.layer, ctx.inputs, ctx.own, ctx.whole = layer, inputs, own, layer.whole
        attention = layer.self_attention.core_attention
        kept: list[Tensor] = []
        attention.kept = None if layer.whole else kept
        with nullcontext() if layer.recomputes else _Keep() as products:
            output = layer.run(hidden.detach(), inputs)
        attention.kept = None
        own_products: list[Tensor] = []
        if products is not None:
            assert products.count == PRODUCTS, "the layer has other linear layers than a GPT's"
            own_products = products.kept
        kept = [_alone(each, own_products) for each in kept]
        ctx.save_for_backward(hidden, *kept, *own_products)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        layer, own = ctx.layer, ctx.own
        hidden, *kept = ctx.saved_tensors
        if ctx.whole:
            hidden = hidden.detach().requires_grad_()
            with torch.enable_grad():
                output = layer.run(hidden, ctx.inputs)
            torch.autograd.backward(output, gradient)
            return hidden.grad, None, None, None
        packed: PackedForPlainLayers | None = ctx.inputs["packed_seq_params"]
        if own.rows is None:
            separate = None if packed is None else packed.separate
            own.rows = SelectedRows(gradient, layer.sharing, separate)
        rows, (key, value, *products) = own.rows, kept
        taken = rows.take(hidden).requires_grad_()
        inputs = ctx.inputs | {"packed_seq_params": _OfRows(rows, key, value)}
        with torch.enable_grad(), _Known(products, rows.filled):
            output = layer.run(taken, inputs)
        torch.autograd.backward(output, rows.take(gradient))
        assert taken.grad is not None
        return rows.put(taken.grad, hidden), None, None, None


def _alone(values: Tensor, kept: list[Tensor]) -> Tensor:
    """Return values that keep no others in memory, of which they may be a part, but those `kept`
    in any case: what has a bias is no part of its product."""
    storage = values.untyped_storage()
    known = any(each.untyped_storage().data_ptr() == storage.data_ptr() for each in kept)
    return values if known or storage.nbytes() == values.nbytes else values.clone()


class _Keep(TorchDispatchMode):
    """Keeps the products of a layer's linear layers, but for the last, which no gradient needs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is PRODUCT:
            self.count += 1
            if self.count < PRODUCTS:
                # Tensor-parallel ranks add up the second one in place.
                self.kept.append(result.clone() if self.count == 2 else result)
        return result


class _Known(TorchDispatchMode):
    """Takes the rows of kept products in the place of computing them, if there are any."""

    def __init__(self, products: list[Tensor], rows: Tensor) -> None:
        super().__init__()
        self.products: Iterator[Tensor] | None = iter(products) if products else None
        self.rows = rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not PRODUCT or self.products is None:
            return func(*args, **(kwargs or {}))
        known = next(self.products, None)
        if known is None:
            return args[0].new_zeros(len(args[0]), args[1].shape[1])
        return known.index_select(0, self.rows)
