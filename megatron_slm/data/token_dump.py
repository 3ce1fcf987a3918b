"""Per-token losses of a few fixed samples at one moment of a run: one safetensors file each.

    DIR/iter_0000100.safetensors     after 100 iterations
        tokens            int32 [n, s + 1]    losses[i, j] is that of token j + 1
        losses            float32 [n, s], nats
        reference_losses  the same of the reference, if there is one
        selected          bool [n, s], which tokens the run would train on; absent if not asked
        valid             bool [n, s], False for padding and what the loss mask leaves out
        samples           int64 [n], number of each sample in its dataset

Its metadata say which tokenizer and selection were used (`about`).  A file gets its name when it is
whole and on the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_slm.errors import UserError
from megatron_slm.files import write_whole

FORMAT = "megatron-slm token dump 1"


@dataclass(frozen=True)
class TokenDump:
    """iteration: how many iterations the weights have been trained.  about: see above.
    Arrays as in the file; n samples of s tokens.
    """

    iteration: int
    tokens: NDArray[np.int32]
    losses: NDArray[np.float32]
    valid: NDArray[np.bool_]
    samples: NDArray[np.int64]
    about: dict[str, Any]
    reference_losses: NDArray[np.float32] | None = None
    selected: NDArray[np.bool_] | None = None


def dump_path(directory: Path, iteration: int) -> Path:
    """Where a dump is."""
    return directory / f"iter_{iteration:07d}.safetensors"


def write_dump(directory: Path, dump: TokenDump) -> Path:
    """Write a dump, whole or not at all; one of the same iteration is replaced."""
    arrays = {
        "tokens": dump.tokens,
        "losses": dump.losses,
        "valid": dump.valid,
        "samples": dump.samples,
        "reference_losses": dump.reference_losses,
        "selected": dump.selected,
    }
    content = save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None},
        {
            "format": FORMAT,
            "iteration": str(dump.iteration),
            "about": json.dumps(dump.about),
        },
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = dump_path(directory, dump.iteration)
    write_whole(path, content)
    return path


def read_dump(path: Path) -> TokenDump:
    """
    Raises:
        UserError: not such a file, or damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a token dump of this version")
    return TokenDump(
        iteration=int(metadata["iteration"]), about=json.loads(metadata["about"]), **arrays
    )


def read_dumps(directory: Path, iterations: list[int] | None = None) -> list[TokenDump]:
    """The dumps of a directory, in the order of their iterations.

    Args:
        iterations: of those wanted; None for all.

    Raises:
        UserError: there are none, one is damaged, or they are not of the same samples.
    """
    paths = sorted(directory.glob("iter_*.safetensors"), key=lambda path: (len(path.name), path))
    if iterations is not None:
        paths = [dump_path(directory, iteration) for iteration in sorted(iterations)]
    if not paths:
        raise UserError(f"{directory} has no token dumps (iter_*.safetensors)")
    dumps = [read_dump(path) for path in paths]
    for path, dump in zip(paths, dumps, strict=True):
        if not np.array_equal(dump.tokens, dumps[0].tokens):
            raise UserError(
                f"{path} has other samples than {paths[0]}: they are of different runs; keep each "
                "run's in a directory of its own"
            )
    return dumps
