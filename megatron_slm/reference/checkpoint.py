"""A reference's checkpoint, checked before anything is built from it.

Every check here reads files alone, so that every rank finds the same fault by itself, before the
first collective, and leaves with the same exit code.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader

from megatron_slm.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
END_BYTES = 1 << 16  # of each file, for a fingerprint

# What shapes a dense GPT or its arithmetic; everything else (parallelism, precision, recompute) the
# reference takes from the policy's run.
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
""".split()

UNSUPPORTED = {
    "num_experts": "a mixture of experts",
    "multi_latent_attention": "multi-latent attention",
    "experimental_attention_variant": "an experimental attention variant",
    "heterogeneous_layers_config_path": "heterogeneous layers",
    "heterogeneous_layers_config_encoded_json": "heterogeneous layers",
    "hybrid_layer_pattern": "hybrid layers",
    "spec": "a layer spec of its own",
}


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """directory: one iteration's torch_dist checkpoint.
    arguments: those of the run that saved it.
    """

    directory: Path
    arguments: Namespace

    def architecture(self) -> dict[str, Any]:
        """Arguments that shape the reference, as far as the checkpoint has them."""
        saved = vars(self.arguments)
        return {name: saved[name] for name in ARCHITECTURE if name in saved}


def open_checkpoint(load: str, step: int | None) -> ReferenceCheckpoint:
    """Find a checkpoint as Megatron's --load does and check that its files are whole.

    Args:
        load: a directory with iter_* directories and a tracker file, as --save leaves it.
        step: the iteration; None for that of the tracker file.

    Raises:
        UserError: nothing there, another format, truncated, or a model that cannot be a reference.
    """
    directory = _iteration_directory(Path(load), step)
    _check_files(directory)
    try:
        arguments = dist_checkpointing.load_common_state_dict(str(directory))["args"]
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise UserError(
            f"the reference checkpoint {directory} has no readable arguments ({error}); "
            "save it with Megatron's --ckpt-format torch_dist"
        ) from error
    for name, what in UNSUPPORTED.items():
        if getattr(arguments, name, None):
            raise UserError(f"the reference in {directory} has {what}, which is not supported")
    return ReferenceCheckpoint(directory, arguments)


def _iteration_directory(load: Path, step: int | None) -> Path:
    if not load.is_dir():
        raise UserError(f"--slm-reference-load {load}: no such directory")
    if step is None:
        tracker = load / TRACKER
        if not tracker.is_file():
            raise UserError(
                f"--slm-reference-load {load}: there is no {TRACKER}; give the directory that "
                "--save wrote to, or name an iteration with --slm-reference-ckpt-step"
            )
        text = tracker.read_text().strip()
        if text != "release" and not text.isdigit():
            raise UserError(f"{tracker}: {text!r} is not an iteration")
        name = "release" if text == "release" else f"iter_{int(text):07d}"
    else:
        name = f"iter_{step:07d}"
    directory = load / name
    if not directory.is_dir():
        have = sorted(path.name for path in load.glob("iter_*"))
        raise UserError(
            f"--slm-reference-load {load}: there is no {name}, only {have or 'nothing'}"
        )
    return directory


def _check_files(directory: Path) -> None:
    """Every part of every tensor lies within the file that should hold it."""
    if not (directory / ".metadata").is_file():
        raise UserError(
            f"the reference checkpoint {directory} has no .metadata file: it is not in Megatron's "
            "torch_dist format, or its writing was cut short"
        )
    try:
        parts = FileSystemReader(directory).read_metadata().storage_data.values()
        needed: dict[str, int] = {}
        for part in parts:
            end = part.offset + part.length
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), end)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(f"{directory / '.metadata'} is damaged: {error}") from error
    for name, size in needed.items():
        path = directory / name
        have = path.stat().st_size if path.is_file() else None
        if have is None or have < size:
            state = "missing" if have is None else f"truncated ({have} of {size} bytes)"
            raise UserError(
                f"the reference checkpoint is incomplete: {path} is {state}; copy it again or "
                "choose another iteration with --slm-reference-ckpt-step"
            )


def fingerprint(checkpoint: ReferenceCheckpoint) -> dict[str, str]:
    """The iteration's name, and a hash of its files' names, sizes and ends."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.directory.iterdir()):
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            digest.update(f"{path.name} {size}".encode())
            for start in {0, max(0, size - END_BYTES)}:
                stream.seek(start)
                digest.update(stream.read(END_BYTES))
    return {"iteration": checkpoint.directory.name, "files": digest.hexdigest()[:32]}
