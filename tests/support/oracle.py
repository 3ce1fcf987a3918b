"""Selective language modeling in one process: Hugging Face Llama, plain PyTorch, float32.

Shares no code with megatron_slm or Megatron.  Weights come from a Megatron checkpoint through
torch's own converter; tokens from the test's dataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oracle_weights import saved_weights, weights_outside_mlps


@dataclass
class Step:
    """One step of the oracle: scores, valid and selected are [global batch, s].
    watched: losses of policy and reference before it, [2, n, s], of samples that it is not about.
    """

    lm_loss: float
    selected_loss: float
    unselected_loss: float
    all_token_loss: float
    reference_loss: float
    excess_loss: float
    grad_norm: float
    scores: Tensor
    valid: Tensor
    selected: Tensor
    thresholds: Tensor  # one per sample: that of its scope
    watched: Tensor


def llama(
    checkpoint: Path, scratch: Path, *, heads: int, groups: int, tied: bool, base: float = 10000.0
) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """Make a Hugging Face model with the weights of a Megatron torch_dist checkpoint: a Qwen3 if it
    has norms of queries and keys, whose biases may then be there as well."""
    saved = saved_weights(checkpoint, scratch)
    qkv = saved["decoder.layers.self_attention.linear_qkv.weight"]
    gate_up = saved["decoder.layers.mlp.linear_fc1.weight"]
    layers, _, hidden = qkv.shape
    embedding = saved["embedding.word_embeddings.weight"]
    head_dim = qkv.shape[1] // (heads + 2 * groups)
    norms = "decoder.layers.self_attention.q_layernorm.weight" in saved
    biases = saved.get("decoder.layers.self_attention.linear_qkv.bias")
    kind, of_kind = (Qwen3Config, Qwen3ForCausalLM) if norms else (LlamaConfig, LlamaForCausalLM)
    config = kind(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=gate_up.shape[1] // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        attention_bias=biases is not None,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    weights = weights_outside_mlps(saved, heads, groups, tied)
    per_group = heads // groups
    for i in range(layers):
        gate, up = gate_up[i].chunk(2)
        prefix = f"model.layers.{i}."
        weights |= {
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": saved["decoder.layers.mlp.linear_fc2.weight"][i],
            prefix + "post_attention_layernorm.weight": saved[
                "decoder.layers.mlp.linear_fc1.layer_norm_weight"
            ][i],
        }
        for short in "qk" if norms else "":
            weights[f"{prefix}self_attn.{short}_norm.weight"] = saved[
                f"decoder.layers.self_attention.{short}_layernorm.weight"
            ][i]
        if biases is not None:
            # Rows as those of the weights (oracle_weights.py).
            rows = biases[i].view(groups, per_group + 2, head_dim)
            weights |= {
                prefix + "self_attn.q_proj.bias": rows[:, :per_group].reshape(-1),
                prefix + "self_attn.k_proj.bias": rows[:, per_group].reshape(-1),
                prefix + "self_attn.v_proj.bias": rows[:, per_group + 1].reshape(-1),
                prefix + "self_attn.o_proj.bias": torch.zeros(hidden),  # which Megatron lacks
            }
    model = of_kind(config).float()
    model.load_state_dict({name: value.clone() for name, value in weights.items()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("o_proj.bias"))
    return model


@dataclass
class Method:
    """What is selected and how it counts.

    scope_samples: consecutive samples whose tokens compete; None for a threshold carried from step
        to step, with micro-batches of `micro_batch` samples in the first.
    """

    ratio: float
    scope_samples: int | None
    micro_batch: int
    score: str = "excess"
    weighting: str = "hard"
    temperature: float = 1.0
    guard: float = 0.0
    later: dict[int, float] = field(default_factory=dict)  # ratios from these steps on
    backward: str = "all"
    gamma: float = 1.0


class Experts(Protocol):
    """What the experts of a policy add to a step."""

    def auxiliary_loss(self, valid: Tensor) -> Tensor:
        """Return what is added to the loss after a pass."""
        ...

    def after_backward(self) -> None:
        """Change what does not have a gradient."""
        ...


def train(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    samples: dict[str, Tensor],
    method: Method,
    *,
    steps: int,
    global_batch: int,
    vocabulary: int,
    watched: dict[str, Tensor],
    experts: Experts | None = None,
    lr: float = 3e-4,
    weight_decay: float = 0.01,
    clip: float = 1.0,
) -> list[Step]:
    """Train for `steps` on consecutive samples; tokens, labels int64, loss_mask float [N, s].

    With documents, the number of each token's document in its sample, int64 [N, s], these do not
    see each other.

    vocabulary: number of tokens; logits beyond it are padding, which counts in the policy's
        losses that are trained and reported, and not in what tokens are scored by.
    watched: samples whose losses are computed before each step.
    """
    decay = [p for p in policy.parameters() if p.ndim > 1]
    rest = [p for p in policy.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    done = []
    carried = None
    for step in range(steps):
        method = replace(method, ratio=method.later.get(step, method.ratio))
        rows = slice(step * global_batch, (step + 1) * global_batch)
        tokens, labels, mask = (samples[key][rows] for key in ("tokens", "labels", "loss_mask"))
        valid = mask > 0
        documents = samples["documents"][rows] if "documents" in samples else None
        with torch.no_grad():
            reference_logits = logits_of(reference, tokens, documents)[..., :vocabulary]
            reference_losses = _token_losses(reference_logits, labels)
            of_watched = [
                _token_losses(
                    logits_of(model, watched["tokens"], watched.get("documents"))[..., :vocabulary],
                    watched["labels"],
                )
                for model in (policy, reference)
            ]
        logits = logits_of(policy, tokens, documents)
        trained = _token_losses(logits, labels)
        of_tokens = logits.detach()[..., :vocabulary]
        losses = _token_losses(of_tokens, labels)
        excess = losses - reference_losses
        scores = {
            "excess": excess,
            "lowest": -excess,
            "reference": -reference_losses,
            "policy": losses,
            "context": excess.abs(),
            "retrospective": -excess,
            "policy-entropy": _entropies(of_tokens),
            "reference-entropy": -_entropies(reference_logits),
        }[method.score]
        selected, thresholds = select(scores, valid, method, carried)
        if method.scope_samples is None:
            _, exact = select(scores, valid, replace(method, scope_samples=global_batch), None)
            carried = exact[0] if carried is None else 0.8 * carried + 0.2 * exact[0]
        raw = {
            "dft": of_tokens.softmax(-1).gather(2, labels[..., None])[..., 0],
            "mile": (1 + _entropies(of_tokens)) ** method.gamma,
            "eaft": _entropies(of_tokens.topk(20).values) / 3,
            "longce": (reference_losses - losses).exp().clamp(max=method.gamma),
            "context": excess.abs(),
        }.get(method.weighting)
        weights = _weights(scores, valid, selected, method)
        if raw is not None:
            weights = _of_selected(raw, selected, method)
        if method.backward == "selected" and method.ratio < 1:
            with constant(policy, ~selected):
                trained = _token_losses(logits_of(policy, tokens, documents), labels)
        loss = (weights * trained).sum() / selected.sum()
        optimizer.zero_grad()
        whole = loss if experts is None else loss + experts.auxiliary_loss(valid)
        whole.backward()
        if experts is not None:
            experts.after_backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
        optimizer.step()
        done.append(
            Step(
                lm_loss=loss.item(),
                selected_loss=trained[selected].mean().item(),
                unselected_loss=trained[valid & ~selected].mean().item(),
                all_token_loss=trained[valid].mean().item(),
                reference_loss=reference_losses[valid].mean().item(),
                excess_loss=excess[valid].mean().item(),
                grad_norm=norm.item(),
                scores=scores,
                valid=valid,
                selected=selected,
                thresholds=thresholds,
                watched=torch.stack(of_watched),
            )
        )
    return done


@contextmanager
def constant(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """While it lasts: hidden states, keys and values of these tokens, bool [b, s], have no gradient
    in any layer."""

    def cut(values: Tensor) -> Tensor:
        chosen = tokens.view(*tokens.shape, *[1] * (values.ndim - tokens.ndim))
        return torch.where(chosen, values.detach(), values)

    def cut_input(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (cut(inputs[0]), *inputs[1:])

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_pre_hook(cut_input))
        attention = layer.self_attn
        for last in (getattr(attention, "k_norm", attention.k_proj), attention.v_proj):
            hooks.append(last.register_forward_hook(lambda *call: cut(call[-1])))
    yield
    for hook in hooks:
        hook.remove()


def logits_of(model: LlamaForCausalLM, tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Logits of samples, [b, s, v]; of documents that do not see each other, by a mask."""
    if documents is None:
        return model(tokens).logits
    places = torch.arange(tokens.shape[1])
    same = documents[:, :, None] == documents[:, None, :]
    seen = same & (places[:, None] >= places)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = seen.sum(2) - 1
    return model(tokens, attention_mask=mask[:, None], position_ids=positions).logits


def select(
    scores: Tensor, valid: Tensor, method: Method, carried: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the selected tokens, and the threshold of each sample."""
    if method.scope_samples is None and carried is not None:
        return valid & (scores >= carried), carried.expand(len(scores))
    size = method.scope_samples or method.micro_batch
    selected = torch.zeros_like(valid)
    thresholds = torch.zeros(len(scores))
    for start in range(0, len(scores), size):
        part = slice(start, start + size)
        chosen = _top(scores[part].flatten(), valid[part].flatten(), method.ratio)
        selected[part] = chosen.view(selected[part].shape)
        thresholds[part] = scores[part].flatten()[chosen].min()
    return selected, thresholds


def _weights(scores: Tensor, valid: Tensor, selected: Tensor, method: Method) -> Tensor:
    """How much each token counts; soft weights and guard over each scope on its own."""
    weights = selected.float()
    assert method.scope_samples or (method.weighting == "hard" and not method.guard)
    for start in range(0, len(scores), method.scope_samples or len(scores)):
        part = slice(start, start + (method.scope_samples or len(scores)))
        here, count = valid[part], selected[part].sum()
        if method.weighting == "relu":
            raw = scores[part].clamp(min=0) * here
            weights[part] = raw / raw.sum() * count
        elif method.weighting == "softmax":
            raw = (scores[part] / method.temperature).masked_fill(~here, -torch.inf)
            weights[part] = raw.flatten().softmax(0).view(raw.shape) * count
        if method.guard:
            unselected = here & ~selected[part]
            weights[part] += method.guard * unselected * count / unselected.sum()
    return weights


def _of_selected(raw: Tensor, selected: Tensor, method: Method) -> Tensor:
    """How much each selected token counts, by its method; normalized over each scope if it is."""
    weights = raw * selected
    if method.weighting in ("mile", "context"):
        assert method.scope_samples
        for start in range(0, len(raw), method.scope_samples):
            part = slice(start, start + method.scope_samples)
            weights[part] *= selected[part].sum() / weights[part].sum()
    return weights


def _entropies(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def _top(scores: Tensor, valid: Tensor, ratio: float) -> Tensor:
    """Select the k highest valid scores, ties to the lower position; k = N * ratio, half up."""
    number = int(valid.sum())
    exact = Fraction(str(ratio)) * number
    count = min(number, max(1, int(exact + Fraction(1, 2))))
    order = sorted(valid.nonzero().flatten().tolist(), key=lambda i: (-scores[i].item(), i))
    chosen = torch.zeros_like(valid)
    chosen[order[:count]] = True
    return chosen
