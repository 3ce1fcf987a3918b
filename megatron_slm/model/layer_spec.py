"""A transformer layer of plain torch that allows sequence and context parallelism.

Megatron's local layers refuse both without Transformer Engine: its torch norm has no
sequence-parallel weight, its attention no context parallelism.  This spec replaces just these two,
and is used only where Transformer Engine is absent: on CPUs, and on a GPU to try things out.  Long
runs on GPUs want Transformer Engine, which has fused layers, fp8, and attention kernels for windows
and context parallelism.  Weights have the same names in checkpoints either way, and what is saved
with either is loaded with the other.

Attention calls torch's fused kernels, which on a GPU keep no scores in memory.  They take grouped
keys and values only without a mask, so a mask is built only where one cuts something, and then each
group is repeated for its heads (with grouped ones torch would fall back to float32 scores of
[heads, s, s] a layer).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import dropout, scaled_dot_product_attention

from megatron_slm.errors import UserError
from megatron_slm.model.documents import Documents, PackedForPlainLayers, SeparateDocuments, zigzag
from megatron_slm.model.extra_states import NORM_OF_EXPERTS


def plain_block_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers of one (virtual) pipeline stage.

    Args:
        config: a GPTModelConfig or TransformerConfig.

    Raises:
        UserError: for an option that only Transformer Engine offers.
    """
    check_plain(config)
    transformer = getattr(config, "transformer", config)
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        vp_stage=vp_stage,
    )
    for layer in block.layer_specs:  # layers of one kind share their spec
        make_plain(layer.submodules, config.qk_layernorm)
    block.layer_norm = SequenceParallelNorm
    return block


def make_plain(parts: TransformerLayerSubmodules, qk_layernorm: bool) -> None:
    """Replace the parts of one of Megatron's local layers that Transformer Engine would have to
    replace for sequence and context parallelism."""
    parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelNorm
    parts.self_attention.module = DocumentAttention
    attention = parts.self_attention.submodules
    attention.core_attention = GatheredAttention
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelNorm
    if getattr(parts.mlp, "func", None) is MoELayer:
        # Transformer Engine has no linear layer to fuse this norm with, and keeps its name.
        parts.sharded_state_dict_keys_map.pop(f"{NORM_OF_EXPERTS}.", None)


def check_plain(config: Any) -> None:
    """Refuse options that only Transformer Engine offers.

    Args:
        config: the configuration of a model that is to have plain layers.

    Raises:
        UserError: there is such an option; the message names it.
    """
    unsupported = {
        "multi_latent_attention": "multi-latent attention",
        "experimental_attention_variant": "experimental attention variants",
        "fp8": "fp8",
        "fp4": "fp4",
        "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
        "fp32_residual_connection": "--fp32-residual-connection",  # torch's norms return float32
    }
    if config.softmax_type != "vanilla":
        raise UserError(f"--softmax-type {config.softmax_type} needs Transformer Engine")
    for name, what in unsupported.items():
        if getattr(config, name, None):
            raise UserError(f"{what} needs Transformer Engine, which is not installed here")


class SequenceParallelNorm:
    """torch's RMSNorm or LayerNorm; with sequence parallelism each rank normalises its own part of
    the sequence, so Megatron has to sum the weight's gradient over tensor-parallel ranks."""

    def __new__(
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> torch.nn.Module:
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class DocumentAttention(SelfAttention):
    """Megatron's self-attention, in which rotary positions begin anew in each document."""

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedForPlainLayers | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        separate = None
        if packed_seq_params is not None:
            separate = packed_seq_params.separate
            if rotary_pos_emb is not None:
                rotary_pos_emb = separate.rotary(rotary_pos_emb, self.pg_collection.cp)
        attended: tuple[Tensor, Tensor | None] = super().forward(
            *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=separate, **kwargs
        )
        return attended


class GatheredAttention(MegatronModule):
    """Causal attention over keys and values gathered from all context-parallel ranks.

    Queries, keys and values are [s/c, b, heads/t, d] for c ranks, in Megatron's zigzag order (rank
    r holds chunks r and 2c-1-r of 2c).  One all-gather of keys and values forward, one all-reduce
    of their gradients backward.

    Of packed samples, documents of one length are attended to together, so that nothing is computed
    across documents.  Context-parallel ranks hold parts of documents, and mask the rest.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.cp_group = groups.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or config.kv_channels**-0.5
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SeparateDocuments | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[s/c, b, heads/t * d].  attention_mask is not read: the mask is causal."""
        length, batch = query.shape[:2]
        if self.cp_group.size() > 1:
            key = GatherSequence.apply(key, self.cp_group)
            value = GatherSequence.apply(value, self.cp_group)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if packed_seq_params is None or not packed_seq_params.documents.several:
            context = self._causal(query, key, value)
        elif self.cp_group.size() > 1:
            left = self._window_over(key.shape[2])
            mask = packed_seq_params.mask(left, query.dtype, self.cp_group)
            context = self._masked(query, key, value, mask)
        else:
            context = self._by_document(query, key, value, packed_seq_params.documents)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _causal(
        self, query: Tensor, key: Tensor, value: Tensor, longest: int | None = None
    ) -> Tensor:
        """Attend over whole sequences: [b, heads, s/c, d], and [b, groups, s, d].

        If there is a `longest`, a mask is cut from that of sequences as long, which all lengths can
        share.
        """
        size, rank, length = self.cp_group.size(), self.cp_group.rank(), key.shape[2]
        left = self._window_over(length)
        if size == 1 and left is None and not self._drops():
            return scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                scale=self.scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        # A dry run's fake tensors are of no use to the next.
        build = _causal_mask if type(query) is Tensor else _causal_mask.__wrapped__
        mask = build(longest or length, rank, size, left, query.dtype, query.device)
        if longest is not None:
            mask = mask[:length, :length]
        return self._masked(query, key, value, mask)

    def _by_document(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents
    ) -> Tensor:
        """Attend within documents; [b, heads, s, d], and [b, groups, s, d]."""
        batch, heads, length, width = query.shape
        sizes = [size * number for size, number in documents.groups]
        parts = [
            x.transpose(1, 2).flatten(0, 1).index_select(0, documents.order).split(sizes)
            for x in (query, key, value)
        ]
        contexts = []
        for (size, number), *of_group in zip(documents.groups, *parts, strict=True):
            q, k, v = (x.unflatten(0, (number, size)).transpose(1, 2) for x in of_group)
            context = self._causal(q, k, v, longest=length)
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        context = torch.cat(contexts).index_select(0, documents.places)
        return context.view(batch, length, heads, width).transpose(1, 2)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        if self._drops():
            return self._with_dropout(query, key, value, mask)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)

    def _window_over(self, length: int) -> int | None:
        """Return how many positions before its own a token sees; None for all of `length`."""
        left = -1 if self.window is None else self.window[0]
        return left if 0 <= left < length - 1 else None

    def _drops(self) -> bool:
        return self.training and self.dropout > 0.0

    def _with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = query.float() @ key.float().transpose(-1, -2) * self.scale
        weights = (scores + mask).softmax(-1)
        # Each tensor-parallel rank has heads of its own, and so dropout of its own.
        with get_cuda_rng_tracker().fork():
            weights = dropout(weights, self.dropout)
        return weights.to(value.dtype) @ value


# Layers of a model share one mask, or two where only some have a window, and so do a reference's.
# Kept from pass to pass: at its peak a pass needs them anyway.
@lru_cache(maxsize=4)
def _causal_mask(
    length: int, rank: int, size: int, left: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Build what is added to the scores of a rank's queries with all keys, [s/c, s]: 0, or -inf at
    positions after a token's own or more than `left` before it.

    It has the scores' type, to which torch would convert a mask of bools anew in each layer.
    """
    of_ranks = [zigzag(length, r, size, device) for r in range(size)]
    own, of_keys = of_ranks[rank][:, None], torch.cat(of_ranks)[None, :]
    hidden = of_keys > own
    if left is not None:
        hidden |= of_keys < own - left
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, -torch.inf)


class GatherSequence(torch.autograd.Function):
    """[s/c, ...] on each rank -> [s, ...], rank by rank; the backward sums and slices."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        torch.distributed.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient = grad_outputs[0].contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None
