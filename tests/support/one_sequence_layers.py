"""Layers for --spec that take packed documents as Megatron passes them, as one sequence: the plain
ones with Megatron's own self-attention and rotary positions, and attention written out."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_slm.model.layer_spec import GatheredAttention, plain_block_spec


class OneSequenceAttention(GatheredAttention):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """[t, heads, d] -> [t, heads * d], document by document."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask)
        ends = packed_seq_params.cu_seqlens_q
        lengths = (ends[1:] - ends[:-1]).tolist()
        assert sum(lengths) == len(query) and max(lengths) == packed_seq_params.max_seqlen_q
        repeat = query.shape[1] // key.shape[1]
        contexts = []
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            contexts.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(contexts).flatten(1)


def layers(config: Any, vp_stage: int | None = None) -> Any:
    spec = plain_block_spec(config, vp_stage)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.module = SelfAttention
        layer.submodules.self_attention.submodules.core_attention = OneSequenceAttention
    return spec
