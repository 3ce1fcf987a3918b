"""The families of models that are converted, one entry of FAMILIES for each.

All share one architecture: RMSNorm before attention and MLP, rotary embeddings, grouped queries and
SwiGLU.  An entry says what a family's config.json has and which keys of it have only one value, and
which parts of Architecture its models have beyond a Llama's: by these, the tensors and Megatron's
arguments follow (tensors.py, architecture.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from megatron_slm.model.experts import Experts, Mixtures
from megatron_slm.model.numbers import ExpertCount, Layers, Positive, Size, SizeOrNone

FULL, SLIDING = "full_attention", "sliding_attention"


class LlamaConfig(msgspec.Struct):
    """A Llama's config.json; the defaults are those of transformers."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    vocab_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | UnsetType | None = None
    max_position_embeddings: Size = 2048
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: Any = 10000.0
    partial_rotary_factor: Any = None
    original_max_position_embeddings: Any = UNSET

    @property
    def window(self) -> int | None:
        """Number of tokens that a query sees, itself included; None for all before it."""
        return None

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer's attention."""
        every = FULL if self.window is None else SLIDING
        return self.layer_types or [every] * self.num_hidden_layers

    @staticmethod
    def window_keys(window: int | None) -> dict[str, Any]:
        """Return the keys that say that all layers have this window, or none if it is None."""
        return {}

    @property
    def experts(self) -> Experts | None:
        """The mixtures of experts."""
        return None

    @staticmethod
    def expert_keys(experts: Experts) -> dict[str, Any]:
        """Return the keys that describe mixtures of experts."""
        return {}


class MistralConfig(LlamaConfig):
    """A Mistral's config.json."""

    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 4096 * 32
    sliding_window: Size | None = 4096

    @property
    def window(self) -> int | None:
        return self.sliding_window

    @staticmethod
    def window_keys(window: int | None) -> dict[str, Any]:
        return {"sliding_window": window}  # transformers assumes 4096 if it is absent


class Qwen2Config(LlamaConfig):
    """A Qwen2's or Qwen2.5's config.json, whose window counts only with use_sliding_window."""

    num_key_value_heads: Size | None = 32
    head_dim: Size | UnsetType = UNSET  # may be absent, and not null
    max_position_embeddings: Size = 32768
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: int = 28

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window and SLIDING in self.kinds else None

    @property
    def kinds(self) -> list[str]:
        if self.layer_types is not None:
            return self.layer_types
        windows = self.use_sliding_window and self.sliding_window is not None
        full = self.max_window_layers if windows else self.num_hidden_layers
        return [FULL if layer < full else SLIDING for layer in range(self.num_hidden_layers)]

    @staticmethod
    def window_keys(window: int | None) -> dict[str, Any]:
        if window is None:
            return {"use_sliding_window": False}
        return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


class Qwen3Config(Qwen2Config):
    """A Qwen3's config.json."""

    head_dim: Size = 128


class MixtralConfig(MistralConfig):
    """A Mixtral's config.json."""

    rms_norm_eps: Positive = 1e-5
    rope_theta: Any = 1e6
    sliding_window: Size | None = None
    num_local_experts: ExpertCount = 8
    num_experts_per_tok: Size = 2

    @property
    def experts(self) -> Experts:
        every = (True,) * self.num_hidden_layers
        count, top_k = self.num_local_experts, self.num_experts_per_tok
        return Experts(count, top_k, self.intermediate_size, 0, True, every)

    @staticmethod
    def expert_keys(experts: Experts) -> dict[str, Any]:
        return {"num_local_experts": experts.count, "num_experts_per_tok": experts.top_k}


class Qwen3MoeConfig(LlamaConfig):
    """A Qwen3-MoE's config.json."""

    num_key_value_heads: Size | None = 4
    head_dim: Size | UnsetType = UNSET
    max_position_embeddings: Size = 32768
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_experts: ExpertCount | UnsetType = UNSET
    num_local_experts: ExpertCount | UnsetType = UNSET  # transformers 5's name for it
    num_experts_per_tok: Size = 8
    moe_intermediate_size: Size = 768
    shared_expert_intermediate_size: SizeOrNone = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[int] | None = None

    @property
    def experts(self) -> Experts:
        dense = set(self.mlp_only_layers or [])
        layers = tuple(
            layer not in dense and (layer + 1) % self.decoder_sparse_step == 0
            for layer in range(self.num_hidden_layers)
        )
        return Experts(
            count=self.num_experts or self.num_local_experts or 128,
            top_k=self.num_experts_per_tok,
            ffn=self.moe_intermediate_size,
            shared_ffn=self.shared_expert_intermediate_size,
            normed=self.norm_topk_prob,
            layers=layers,
        )

    @staticmethod
    def expert_keys(experts: Experts) -> dict[str, Any]:
        shared = {"shared_expert_intermediate_size": experts.shared_ffn}
        return {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.ffn,
            "norm_topk_prob": experts.normed,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [at for at, mixed in enumerate(experts.layers) if not mixed],
        } | (shared if experts.shared_ffn else {})


class Qwen2MoeConfig(Qwen3MoeConfig):
    """A Qwen2-MoE's config.json."""

    num_key_value_heads: Size | None = 16
    num_experts: ExpertCount = 60
    num_experts_per_tok: Size = 4
    moe_intermediate_size: Size = 1408
    shared_expert_intermediate_size: Size = 5632


class SeedOssConfig(LlamaConfig):
    """A Seed-OSS's config.json."""

    num_key_value_heads: Size | None = 8
    head_dim: Size | None = 128
    max_position_embeddings: Size = 524288
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1


# Keys of config.json that change what is computed or which weights are read, with the only value
# that is supported, which is also what they are if they are absent.
ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "per_layer_config": None,
    "transformers_weights": None,
}


@dataclass(frozen=True)
class Family:
    """What the models of one model_type have."""

    causal_lm: str
    """The class in transformers of a model with its output layer."""
    config: type[LlamaConfig]
    """The keys of config.json that are read, with transformers' defaults."""
    has: frozenset[str] = frozenset()
    """The Boolean fields of Architecture that are true for all of its models; the rest are false
    for all of them."""
    windows: bool = False
    """Whether its models may have a sliding window."""
    whole_heads: bool = False
    """Whether transformers wants the hidden size to be a multiple of the number of heads."""
    head_dim: bool = True
    """Whether config.json always has head_dim; otherwise only where hidden / heads is another."""
    mixtures: Mixtures = field(default_factory=Mixtures)
    """The mixtures of experts that its models have."""
    only: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json with the only supported value, where ONLY lacks them or has another."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", LlamaConfig, whole_heads=True),
    "mistral": Family("MistralForCausalLM", MistralConfig, windows=True),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        Qwen2Config,
        has=frozenset({"qkv_bias"}),
        windows=True,
        head_dim=False,
        only={"attention_bias": True},
    ),
    "qwen3": Family("Qwen3ForCausalLM", Qwen3Config, has=frozenset({"qk_norm"}), windows=True),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        SeedOssConfig,
        has=frozenset({"qkv_bias"}),
        only={"attention_bias": True, "attention_out_bias": False},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        MixtralConfig,
        windows=True,
        mixtures=Mixtures("all layers", "block_sparse_moe", ("w1", "w3", "w2")),
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        Qwen2MoeConfig,
        has=frozenset({"qkv_bias"}),
        head_dim=False,
        mixtures=Mixtures("shared"),
        only={"attention_bias": True, "qkv_bias": True, "use_sliding_window": False},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        Qwen3MoeConfig,
        has=frozenset({"qk_norm"}),
        head_dim=False,
        mixtures=Mixtures("some layers"),
        only={"use_sliding_window": False, "shared_expert_intermediate_size": 0},
    ),
}

GEMMA = (
    "embeddings scaled by the root of the hidden size, norms whose weights count from one, and a "
    "GELU in the MLP"
)
GEMMA2 = f"{GEMMA}, and norms after attention and MLP"
OLMO2 = "norms after attention and MLP in place of those before them, and of all queries together"
DEEPSEEK = "multi-latent attention"
# What the converter lacks for model types that one might expect of it.
LACKING = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "gemma3_text": GEMMA2,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "phi3": "tensors that fuse queries, keys and values, and gate and up projections",
    "granite": "multipliers of embeddings, attention, residuals and logits",
    "smollm3": "layers without rotary embeddings",
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": "attention sinks",
    "qwen3_next": "layers of linear attention",
}
