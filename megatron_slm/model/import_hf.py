"""Hugging Face safetensors to a Megatron checkpoint, a block at a time.

    config.json -> architecture -> blocks, dealt out to ranks by size
    each rank      tensor(s) from safetensors -> fused -> its own file
    rank 0         the table of all blocks, Megatron's arguments

Everything is checked from the files' headers, by every rank, before the first byte is written.
"""

from __future__ import annotations

import json
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
    architecture = read_architecture(source)
    tensors = _matching_tensors(source, architecture)
    padded = -(-architecture.vocabulary // vocabulary_multiple) * vocabulary_multiple
    arguments = _arguments(architecture, padded, vocabulary_multiple)
    parts = [_part(block, architecture, tensors) for block in blocks(architecture, padded)]
    rank, size = this_rank()
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
    path = source / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model's: it has no object, but {str(config)[:40]!r}")
    return from_hugging_face(config, str(path))


def _matching_tensors(source: Path, a: Architecture) -> dict[str, StoredTensor]:
    """The model's tensors, all of one dtype and of the shapes that its architecture says."""
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


def _part(block: Block, a: Architecture, tensors: dict[str, StoredTensor]) -> Part:
    sources = [tensors[name] for name in block.names]
    # Padding has the dtype of what it pads.
    dtype = sources[0].dtype if sources else tensors["model.embed_tokens.weight"].dtype
    if any(source.dtype != dtype for source in sources):
        raise UserError(f"{', '.join(block.names)} are fused, and have different dtypes")
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
