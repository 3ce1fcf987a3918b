"""Open a reference's checkpoint, and check it before anything is built from it.

The checks only read files, so that every rank finds the same fault by itself, before the first
collective, and exits with the same code.  Megatron unpickles the checkpoint later; what has passed
these checks is safe to unpickle.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slm.errors import UserError
from megatron_slm.model.hybrid_pattern import SPECS, check_layers
from megatron_slm.model.routing import OTHER_ROUTING, balancing_of
from megatron_slm.model.torch_dist import TorchDistReader, iteration_directory

# For a fingerprint: enough to tell models apart, and little enough for every rank to read.
FILES, BLOCK_BYTES = 8, 1 << 16

# Arguments that shape a GPT or its arithmetic.  The reference takes all others (parallelism,
# precision, recomputation) from the policy's run.
ARCHITECTURE = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
    group_query_attention kv_channels max_position_embeddings position_embedding_type
    add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
    rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
    no_rope_freq yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
    yarn_correction_range_round_to_int rotary_scaling_factor mscale mscale_all_dim
    add_bias_linear add_qkv_bias swiglu squared_relu quick_geglu
    openai_gelu glu_linear_offset activation_func_clamp_value normalization layernorm_epsilon
    norm_epsilon layernorm_zero_centered_gamma apply_layernorm_1p
    apply_residual_connection_post_layernorm apply_query_key_layer_scaling qk_layernorm qk_l2_norm
    softmax_type window_size window_attn_skip_freq attention_output_gate
    untie_embeddings_and_output_weights use_mup mup_width_mult mup_base_hidden_size
    mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
    num_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_shared_expert_gate moe_router_topk moe_router_score_function moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk
    moe_router_enable_expert_bias moe_apply_probs_on_input moe_latent_size hybrid_layer_pattern
""".split()

UNSUPPORTED_MODELS = {
    "multi_latent_attention": "multi-latent attention",
    "experimental_attention_variant": "an experimental attention variant",
    "heterogeneous_layers_config_path": "heterogeneous layers",
    "heterogeneous_layers_config_encoded_json": "heterogeneous layers",
    "spec": "a layer spec of its own",
}


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """A checkpoint of a model that can be a reference."""

    directory: Path
    """The torch_dist checkpoint of one iteration."""
    arguments: Namespace
    """The arguments of the run that saved it."""

    def architecture(self) -> dict[str, Any]:
        """Return the arguments that shape the reference, as far as the checkpoint has them."""
        saved = vars(self.arguments)
        return {name: saved[name] for name in ARCHITECTURE if name in saved}


FLAGS = ("--slm-reference-load", "--slm-reference-ckpt-step")


def open_checkpoint(
    load: str, step: int | None, flags: tuple[str, str] = FLAGS
) -> ReferenceCheckpoint:
    """Find a checkpoint as Megatron's --load does, and check that its files are whole.

    Args:
        load: a directory with iter_* directories and a tracker file, as --save leaves it.
        step: the iteration; None for that of the tracker file.
        flags: the options from which `load` and `step` come, for errors.

    Raises:
        UserError: there is no checkpoint, it has another format or is truncated, or its model
            cannot be a reference.
    """
    directory = iteration_directory(Path(load), step, *flags)
    arguments = TorchDistReader(directory).arguments
    pattern = getattr(arguments, "hybrid_layer_pattern", None)
    if pattern is not None:
        check_layers(pattern, f"the reference in {directory}")
        spec = getattr(arguments, "spec", None)
        if isinstance(spec, list | tuple) and spec and spec[-1] in SPECS:
            arguments.spec = None  # the layers that hybrid models have without it
    for name, what in UNSUPPORTED_MODELS.items():
        if getattr(arguments, name, None):
            raise UserError(f"the reference in {directory} has {what}, which is not supported")
    if getattr(arguments, "num_experts", None):
        for kind in balancing_of(arguments):
            if kind in OTHER_ROUTING:
                raise UserError(
                    f"the reference in {directory} was trained with "
                    f"--moe-router-load-balancing-type {kind}, which {OTHER_ROUTING[kind]}"
                )
    return ReferenceCheckpoint(directory, arguments)


def checkpoint_fingerprint(checkpoint: ReferenceCheckpoint) -> dict[str, str]:
    """Return the iteration's name and a hash of its weights' files.

    The hash is of the files' names and sizes, and of a block from the middle of some of them.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(sorted(checkpoint.directory.glob("*.distcp"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        if number < FILES:
            with path.open("rb") as stream:
                stream.seek(size // 2)
                digest.update(stream.read(BLOCK_BYTES))
    return {"iteration": checkpoint.directory.name, "files": digest.hexdigest()[:32]}
