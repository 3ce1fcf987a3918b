"""Convert Hugging Face safetensors to a Megatron checkpoint, one block at a time.

    1. config.json gives the architecture; its blocks are distributed over the ranks by size.
    2. Each rank reads its tensors from safetensors, fuses them, and writes them to its own file.
    3. Rank 0 writes the table of all blocks, and Megatron's arguments.

Every rank checks everything from the files' headers before the first byte is written.  Where keys
or files disagree, the import does what transformers 5 does, or refuses.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_slm.errors import UserError
from megatron_slm.files import read_json
from megatron_slm.model.architecture import Architecture, to_megatron
from megatron_slm.model.conversion.destination import (
    finished_directory,
    on_first_rank,
    saying_where,
    this_rank,
    together,
)
from megatron_slm.model.conversion.fused_experts import separated
from megatron_slm.model.conversion.safetensors_files import WeightOnDisk, find_tensors
from megatron_slm.model.conversion.tensors import (
    Block,
    blocks,
    extra_state_keys,
    fuse,
    hugging_face_shapes,
)
from megatron_slm.model.hugging_face_config import SPECIAL_IDS, from_hugging_face, typed_config
from megatron_slm.model.torch_dist import (
    ARGUMENTS,
    NO_EXTRA_STATE,
    TRACKER,
    Stored,
    TensorPart,
    write_checkpoint_table,
    write_parts,
)

CONFIG, ADAPTER = "config.json", "adapter_config.json"
CONFIG_LIMIT = 1 << 20  # bytes
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class _Plan:
    """What a directory becomes."""

    architecture: Architecture
    """The model's architecture."""
    arguments: dict[str, Any]
    """Megatron's arguments for the checkpoint."""
    parts: list[TensorPart]
    """All blocks to write."""
    notes: list[str]
    """What the user should know about the conversion."""


def import_hugging_face(source: Path, save: Path, vocabulary_multiple: int) -> dict[str, Any]:
    """Convert a Hugging Face model to a Megatron checkpoint.  Collective over ranks.

    Args:
        source: directory of the Hugging Face model.
        save: directory to write, for Megatron's --load; the checkpoint is a "release" without
            optimizer state.
        vocabulary_multiple: the vocabulary is padded with zeros to a multiple of this number.

    Returns:
        Megatron's arguments in the checkpoint.

    Raises:
        UserError: the model is not supported; a tensor is missing, unknown, or has the wrong shape;
            or the checkpoint cannot be written.
    """
    rank, size = this_rank()
    plan = together(partial(_plan, source, vocabulary_multiple))
    if rank == 0 and plan.notes:
        print(*plan.notes, sep="\n", file=sys.stderr)
    with finished_directory(save, "--save") as directory:
        stored = together(partial(_write, plan, directory, save))
        everywhere: list[Stored | None] = [stored]
        if size > 1:
            everywhere = [None] * size
            distributed.gather_object(stored, everywhere if rank == 0 else None)
        on_first_rank(partial(_complete, plan, directory, save, everywhere))
    return plan.arguments


def _plan(source: Path, vocabulary_multiple: int) -> _Plan:
    config = read_config(source)
    if (source / ADAPTER).exists():
        raise UserError(
            f"{source} has an {ADAPTER}, which transformers would put over the weights; merge the "
            "adapter into them, or remove it"
        )
    architecture = from_hugging_face(config, str(source / CONFIG))
    tensors = separated(find_tensors(source), architecture)
    notes = []
    both = {EMBEDDING, HEAD} <= tensors.keys()
    if architecture.tied and both and not _same(tensors[EMBEDDING], tensors[HEAD]):
        notes.append(
            f"{source / CONFIG} has tie_word_embeddings true, and {tensors[HEAD].file} a {HEAD} "
            f"that differs from {EMBEDDING}: both are kept, untied, as transformers does"
        )
        architecture = replace(architecture, tied=False)
    _check_tensors(source, architecture, tensors)
    padded = -(-architecture.vocabulary // vocabulary_multiple) * vocabulary_multiple
    wanted = blocks(architecture, padded)
    dtypes = _dtypes(wanted, tensors)
    notes += _left_out(config, source, set(dtypes.values()))
    parts = [_part(block, architecture, tensors, dtypes[block.key]) for block in wanted]
    arguments = _arguments(architecture, padded, vocabulary_multiple)
    typed = typed_config(config, str(source / CONFIG))
    ids = {name: getattr(typed, name) for name in SPECIAL_IDS}
    # A run replaces the first by its tokenizer's, and passes the second on.
    arguments |= {"slm_special_ids": ids, "slm_model_special_ids": ids}
    return _Plan(architecture, arguments, parts, notes)


def _write(plan: _Plan, directory: Path, save: Path) -> Stored:
    """Write this rank's share of the tensors."""
    rank, size = this_rank()
    objects = _objects(plan.architecture, plan.arguments) if rank == 0 else {}
    with saying_where(save):
        release = directory / "release"
        release.mkdir(exist_ok=True)
        return write_parts(release, f"__{rank}_0.distcp", _dealt(plan.parts, size)[rank], objects)


def _complete(plan: _Plan, directory: Path, save: Path, everywhere: list[Stored | None]) -> None:
    with saying_where(save):
        stored = [one for one in everywhere if one is not None]
        write_checkpoint_table(directory / "release", plan.parts, stored)
        (directory / TRACKER).write_text("release")


def as_options(arguments: dict[str, Any]) -> str:
    """Return Megatron's options for a model, to be used in place of --use-checkpoint-args.

    Args:
        arguments: what `import_hugging_face` returned.
    """
    names = {
        "layernorm_epsilon": "norm-epsilon",
        "untie_embeddings_and_output_weights": "untie-embeddings-and-output-weights",
    }
    shown = """
        num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention
        num_query_groups kv_channels max_position_embeddings position_embedding_type rotary_base
        use_rope_scaling rope_scaling_factor window_size add_qkv_bias qk_layernorm normalization
        layernorm_epsilon swiglu num_experts moe_router_topk moe_ffn_hidden_size
        moe_router_pre_softmax moe_shared_expert_intermediate_size moe_shared_expert_gate
        moe_layer_freq untie_embeddings_and_output_weights attention_dropout hidden_dropout
    """.split()
    options = ["--disable-bias-linear"]
    for name in shown:
        value, flag = arguments.get(name), "--" + names.get(name, name).replace("_", "-")
        if name == "rope_scaling_factor" and not arguments["use_rope_scaling"]:
            continue
        if value is True:
            options.append(flag)
        elif value is not None and value is not False:
            options += [flag, str(value).replace(" ", "")]
    return shlex.join(options)


def read_config(source: Path) -> dict[str, Any]:
    """Read the config.json of a Hugging Face directory.

    Raises:
        UserError: it cannot be read, or the directory is a Megatron checkpoint.
    """
    path = source / CONFIG
    if not path.exists() and any((source / name).exists() for name in (TRACKER, ".metadata")):
        raise UserError(
            f"{source} is a Megatron checkpoint and has no {CONFIG}; name a Hugging Face "
            "directory, which tools/convert_checkpoint.py export makes of a checkpoint"
        )
    return read_json(path, dict[str, Any], CONFIG_LIMIT)


def _same(one: WeightOnDisk, other: WeightOnDisk) -> bool:
    if one.shape != other.shape:
        return False
    rows = zip(one.read().split(4096), other.read().split(4096), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in rows)


def _check_tensors(source: Path, a: Architecture, found: dict[str, WeightOnDisk]) -> None:
    """Check that the model has the tensors of its architecture, and no others."""
    shapes = hugging_face_shapes(a)
    for name, shape in shapes.items():
        if name not in found:
            untied = f", and {CONFIG} has tie_word_embeddings false" if name == HEAD else ""
            raise UserError(f"{source}: there is no tensor {name}{untied}")
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].file}: {name} is {list(found[name].shape)}, and by config.json "
                f"{list(shape)}"
            )
    ignored = {HEAD} if a.tied else set()
    unknown = [
        name
        for name in found
        if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise UserError(f"{source} has tensors that this architecture lacks: {unknown[:5]}")


def _left_out(config: dict[str, Any], source: Path, dtypes: set[torch.dtype]) -> list[str]:
    """Return notes about what in config.json the checkpoint does not keep."""
    notes = []
    if config.get("attention_dropout"):
        notes.append(
            f"attention_dropout {config['attention_dropout']} of {source / CONFIG} is left out: "
            "a run has what its --attention-dropout says"
        )
    said = config.get("dtype") or config.get("torch_dtype")
    stored = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if said and [said] != stored:
        notes.append(
            f"{source / CONFIG} says {said}, and the tensors are {' and '.join(stored)}: they are "
            "kept as stored"
        )
    return notes


def _dtypes(wanted: list[Block], tensors: dict[str, WeightOnDisk]) -> dict[str, torch.dtype]:
    """Return the dtype of each Megatron tensor.

    Raises:
        UserError: the layers' tensors, which become one, differ in dtype.
    """
    first: dict[str, WeightOnDisk] = {}
    for block in wanted:
        for tensor in (tensors[name] for name in block.names):
            other = first.setdefault(block.key, tensor)
            if tensor.dtype != other.dtype:
                raise UserError(
                    f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}, and {other.name} "
                    f"{other.dtype}: they become one tensor of Megatron's; store the model in one "
                    "dtype"
                )
    return {key: tensor.dtype for key, tensor in first.items()}


def _arguments(a: Architecture, padded: int, multiple: int) -> dict[str, Any]:
    return to_megatron(a) | {
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": multiple,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_format": "torch_dist",
    }


def _objects(a: Architecture, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the objects other than tensors that Megatron expects in a checkpoint."""
    common = {
        "args": Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    return {ARGUMENTS: common} | dict.fromkeys(extra_state_keys(a), NO_EXTRA_STATE)


def _part(
    block: Block, a: Architecture, tensors: dict[str, WeightOnDisk], dtype: torch.dtype
) -> TensorPart:
    sources = [tensors[name] for name in block.names]
    make: Callable[[], Tensor] = (
        (lambda: fuse(a, [source.read() for source in sources]))
        if sources
        else partial(torch.zeros, block.size, dtype=dtype)
    )
    return TensorPart(block.key, block.shape, block.offset, block.size, dtype, make)


def _dealt(parts: list[TensorPart], ranks: int) -> list[list[TensorPart]]:
    """Distribute the parts over the ranks so that each gets about the same number of weights."""
    hands: list[list[TensorPart]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for part in parts:
        least = sizes.index(min(sizes))
        hands[least].append(part)
        sizes[least] += torch.Size(part.size).numel()
    return hands
