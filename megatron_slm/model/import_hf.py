"""Hugging Face safetensors to a Megatron checkpoint, a block at a time.

    config.json -> architecture -> blocks, dealt out to ranks by size
    each rank      tensor(s) from safetensors -> fused -> its own file
    rank 0         the table of all blocks, Megatron's arguments

Everything is checked from the files' headers, by every rank, before the first byte is written.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from megatron_slm.errors import UserError
from megatron_slm.model.architecture import Architecture, from_hugging_face, to_megatron
from megatron_slm.model.destination import finished_directory, this_rank
from megatron_slm.model.safetensors_files import StoredTensor, find_tensors
from megatron_slm.model.tensors import Block, blocks, extra_states, fuse, hugging_face_shapes
from megatron_slm.model.torch_dist import (
    ARGUMENTS,
    NO_EXTRA_STATE,
    TRACKER,
    Part,
    Stored,
    write_parts,
    write_table,
)

CONFIG = "config.json"


def import_hugging_face(source: Path, save: Path, vocabulary_multiple: int) -> dict[str, Any]:
    """Convert the model in `source`.  Collective over ranks.

    Args:
        save: where to write what Megatron's --load takes, as a "release" without optimizer state.
        vocabulary_multiple: the vocabulary is padded with zeros to a multiple of it.

    Returns:
        Megatron's arguments, which the checkpoint carries.

    Raises:
        UserError: an unsupported model, or tensors that are missing, unknown or of another shape.
    """
    rank, size = this_rank()
    config = _read_config(source)
    architecture = from_hugging_face(config, str(source / CONFIG))
    if rank == 0 and config.get("attention_dropout"):
        print(
            f"attention_dropout {config['attention_dropout']} of {source / CONFIG} is left out: "
            "a run has what its --attention-dropout says",
            file=sys.stderr,
        )
    tensors = _matching_tensors(source, architecture)
    padded = -(-architecture.vocabulary // vocabulary_multiple) * vocabulary_multiple
    arguments = _arguments(architecture, padded, vocabulary_multiple)
    wanted = blocks(architecture, padded)
    dtypes = _dtypes(wanted, tensors)
    parts = [_part(block, architecture, tensors, dtypes[block.key]) for block in wanted]
    with finished_directory(save) as directory:
        release = directory / "release"
        release.mkdir(exist_ok=True)
        objects = _objects(architecture, arguments) if rank == 0 else {}
        stored = write_parts(release, f"__{rank}_0.distcp", _dealt(parts, size)[rank], objects)
        everywhere: list[Stored | None] = [stored]
        if size > 1:
            everywhere = [None] * size
            distributed.gather_object(stored, everywhere if rank == 0 else None)
        if rank == 0:
            write_table(release, parts, [one for one in everywhere if one is not None])
            (directory / TRACKER).write_text("release")
    return arguments


def read_architecture(source: Path) -> Architecture:
    """That of a Hugging Face directory.

    Raises:
        UserError: no readable config.json, or as from_hugging_face.
    """
    return from_hugging_face(_read_config(source), str(source / CONFIG))


def _read_config(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's: it has no object, but {str(config)[:40]!r}")
    return config


def _matching_tensors(source: Path, a: Architecture) -> dict[str, StoredTensor]:
    """The model's tensors, of the shapes that its architecture says."""
    found, shapes = find_tensors(source), hugging_face_shapes(a)
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{source}: there is no tensor {name}")
        if found[name].shape != shape:
            raise UserError(
                f"{found[name].file}: {name} is {list(found[name].shape)}, and by config.json "
                f"{list(shape)}"
            )
    ignored = {"lm_head.weight"} if a.tied else set()
    unknown = [
        name
        for name in found
        if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise UserError(f"{source} has tensors that this architecture lacks: {unknown[:5]}")
    return found


def _dtypes(wanted: list[Block], tensors: dict[str, StoredTensor]) -> dict[str, torch.dtype]:
    """Of each Megatron tensor, into which those of all layers go."""
    first: dict[str, StoredTensor] = {}
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
    """What is not a tensor, as Megatron has it in a checkpoint."""
    common = {
        "args": Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    return {ARGUMENTS: common} | dict.fromkeys(extra_states(a.layers), NO_EXTRA_STATE)


def _part(
    block: Block, a: Architecture, tensors: dict[str, StoredTensor], dtype: torch.dtype
) -> Part:
    sources = [tensors[name] for name in block.names]
    make: Callable[[], Tensor] = (
        (lambda: fuse(a, [source.read() for source in sources]))
        if sources
        else partial(torch.zeros, block.size, dtype=dtype)
    )
    return Part(block.key, block.shape, block.offset, block.size, dtype, make)


def _dealt(parts: list[Part], ranks: int) -> list[list[Part]]:
    """Parts for each rank, of about the same size in all."""
    hands: list[list[Part]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for part in parts:
        least = sizes.index(min(sizes))
        hands[least].append(part)
        sizes[least] += torch.Size(part.size).numel()
    return hands
