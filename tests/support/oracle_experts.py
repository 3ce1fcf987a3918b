"""Mixtures of experts for oracle.py: transformers' Mixtral, and routers in plain torch.

Shares no code with megatron_slm or Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from oracle_weights import saved_weights, weights_outside_mlps

TOP = 2


class BiasedRouter(torch.nn.Module):
    """In the place of Mixtral's router: sigmoid scores, and a bias that only chooses."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        scores = logits.sigmoid()
        chosen = (scores + self.bias).topk(TOP, dim=-1).indices
        kept = scores.gather(1, chosen)
        return logits, kept / kept.sum(-1, keepdim=True), chosen


def mixtral(checkpoint: Path, scratch: Path, *, heads: int, groups: int) -> MixtralForCausalLM:
    """Make a Hugging Face model with the weights of a Megatron torch_dist checkpoint."""
    saved = saved_weights(checkpoint, scratch)
    experts = "decoder.layers.mlp.experts.experts."
    gate_up, down = saved[experts + "linear_fc1.weight"], saved[experts + "linear_fc2.weight"]
    layers, number, _, hidden = gate_up.shape
    routers = saved["decoder.layers.mlp.router.weight"]
    config = MixtralConfig(
        vocab_size=len(saved["output_layer.weight"]),
        hidden_size=hidden,
        intermediate_size=down.shape[-1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_local_experts=number,
        num_experts_per_tok=TOP,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    weights = weights_outside_mlps(saved, heads, groups)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        weights |= {
            prefix + "mlp.gate.weight": routers[i],
            prefix + "mlp.experts.gate_up_proj": gate_up[i],
            prefix + "mlp.experts.down_proj": down[i],
            prefix + "post_attention_layernorm.weight": saved[
                "decoder.layers.pre_mlp_layernorm.weight"
            ][i],
        }
    model = MixtralForCausalLM(config).float()
    model.load_state_dict({name: value.clone() for name, value in weights.items()})
    if "decoder.layers.mlp.router.expert_bias" in saved:
        biases = saved["decoder.layers.mlp.router.expert_bias"].float()
        for block, weight, bias in zip(_blocks(model), routers, biases, strict=True):
            block.gate = BiasedRouter(weight.clone(), bias.clone())
    return model


def _blocks(model: MixtralForCausalLM) -> list[MixtralSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, MixtralSparseMoeBlock)]


@dataclass
class Balanced:
    """What balances a model's experts: losses of its routers, or their biases.

    As in plain Megatron, a micro-batch's losses count as often as it has tokens, and are divided by
    the valid tokens of the step, of which `valid` tells if tokens are left out.
    """

    model: MixtralForCausalLM
    micro_batch: int
    load_balance: float = 0.0
    z: float = 0.0
    bias_rate: float = 0.0
    valid: list[Tensor] | None = None
    gradients: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gates = [block.gate for block in _blocks(self.model)]
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}
        for number, gate in enumerate(self.gates):

            def note(module: object, inputs: object, said: tuple[Tensor, ...], n: int = number):
                self.routed[n] = (said[0], said[2])

            gate.register_forward_hook(note)

    def auxiliary_loss(self, valid: Tensor) -> Tensor:
        total = torch.zeros(())
        for logits, chosen in self.routed.values():
            number = logits.shape[-1]
            size = self.micro_batch * valid.shape[1]
            for part, experts in zip(logits.split(size), chosen.split(size), strict=True):
                share = torch.bincount(experts.flatten(), minlength=number) / experts.numel()
                balance = number * (share * part.softmax(-1).mean(0)).sum()
                squares = part.logsumexp(-1).square().mean()
                total = total + size * (self.load_balance * balance + self.z * squares)
        step = len(self.gradients)
        return total / (valid if self.valid is None else self.valid[step]).sum()

    def after_backward(self) -> None:
        self.gradients.append([gate.weight.grad.clone() for gate in self.gates])
        for number, gate in enumerate(self.gates):
            if self.bias_rate:
                counts = torch.bincount(self.routed[number][1].flatten(), minlength=len(gate.bias))
                gate.bias += self.bias_rate * (counts.float().mean() - counts).sign()
