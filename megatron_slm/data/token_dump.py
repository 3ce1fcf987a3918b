"""Read and write token dumps: the losses of a few fixed samples at one moment of a run.

    DIR/iter_0000100.safetensors     after 100 iterations
        tokens            int32 [n, s + 1]    losses[i, j] is that of token j + 1
        losses            float32 [n, s], nats
        reference_losses  the same for the reference, if there is one
        selected          bool [n, s], which tokens the run would train on; may be absent
        valid             bool [n, s], False for padding and what the loss mask leaves out
        samples           int64 [n], number of each sample in its dataset
        documents         int32 [n, s], where documents do not see each other: the number, within
                          its sample, of the document that token j is in

Its metadata (`about`) say which tokenizer and selection were used.  A file gets its name once it is
complete and on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megatron_slm.data.manifest_types import DumpOrigin
from megatron_slm.errors import UserError
from megatron_slm.files import decode_json, open_regular, write_whole

DUMP_FORMAT = "megatron-slm token dump 1"
MOST_BYTES, MOST_BYTES_OF_ALL = 1 << 30, 1 << 32  # of a dump (80 million tokens), of a directory
# dtype of each array, and its columns: none, s, or s + 1.
ARRAYS: dict[str, tuple[str, int | None]] = {
    "tokens": ("int32", 1),
    "losses": ("float32", 0),
    "reference_losses": ("float32", 0),
    "selected": ("bool", 0),
    "valid": ("bool", 0),
    "samples": ("int64", None),
    "documents": ("int32", 0),
}
OPTIONAL = {"reference_losses", "selected", "documents"}


@dataclass(frozen=True)
class TokenDump:
    """The losses of n samples of s tokens at one iteration."""

    iteration: int
    """Number of iterations that the weights have been trained for."""
    tokens: NDArray[np.int32]
    """[n, s + 1], token ids."""
    losses: NDArray[np.float32]
    """[n, s], in nats; the loss at position j is that of token j + 1."""
    valid: NDArray[np.bool_]
    """[n, s], False for padding and what the loss mask leaves out."""
    samples: NDArray[np.int64]
    """[n], the number of each sample in its dataset."""
    about: DumpOrigin
    """The tokenizer and the selection that were used."""
    reference_losses: NDArray[np.float32] | None = None
    """[n, s], the reference's losses in nats, if there is a reference."""
    selected: NDArray[np.bool_] | None = None
    """[n, s], which tokens the run would train on, if it was asked."""
    documents: NDArray[np.int32] | None = None
    """[n, s], the number within its sample of the document that token j is in; None where documents
    see each other."""

    def begins(self) -> NDArray[np.bool_] | None:
        """Return whether the token of each loss, token j + 1, is the first of its document, [n, s].

        Of the last one in a sample this is not known, and it counts as one that is not.
        """
        if self.documents is None:
            return None
        own = np.zeros(self.losses.shape, np.bool_)
        own[:, :-1] = self.documents[:, 1:] != self.documents[:, :-1]
        return own


def dump_path(directory: Path, iteration: int) -> Path:
    """Return the path of a dump."""
    return directory / f"iter_{iteration:07d}.safetensors"


def write_dump(directory: Path, dump: TokenDump) -> Path:
    """Write a dump, completely or not at all, in place of one of the same iteration; return its
    path."""
    arrays = {
        "tokens": dump.tokens,
        "losses": dump.losses,
        "valid": dump.valid,
        "samples": dump.samples,
        "reference_losses": dump.reference_losses,
        "selected": dump.selected,
        "documents": dump.documents,
    }
    content = save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None},
        {
            "format": DUMP_FORMAT,
            "iteration": str(dump.iteration),
            "about": msgspec.json.encode(dump.about).decode(),
        },
    )
    path = dump_path(directory, dump.iteration)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    write_whole(path, content)
    return path


def read_dump(path: Path) -> TokenDump:
    """Read a dump.

    Raises:
        UserError: it is not such a file, is damaged, or its parts contradict each other.
    """
    with open_regular(path) as regular:
        if regular.seek(0, 2) > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES} bytes, too many for a token dump")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != DUMP_FORMAT:
                raise UserError(f"{path} is not a token dump of this version")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    _check_arrays(path, arrays)
    iteration = decode_json(metadata.get("iteration", ""), int, f"the iteration of {path}")
    if path.name != dump_path(path.parent, iteration).name:
        raise UserError(f"{path} is of iteration {iteration}, which its name does not say")
    about = decode_json(metadata.get("about", ""), DumpOrigin, f"what {path} says of itself")
    if (about.score is UNSET) != (about.scope is UNSET):
        raise UserError(f"{path} says one of score and scope, without the other")
    domains = about.domains
    if isinstance(domains, list) and len(domains) != len(arrays["samples"]):
        raise UserError(f"{path} has {len(domains)} domains for {len(arrays['samples'])} samples")
    return TokenDump(iteration=iteration, about=about, **arrays)


def _check_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    if arrays.keys() - OPTIONAL != ARRAYS.keys() - OPTIONAL:
        raise UserError(f"{path} is not a token dump: it has the arrays {sorted(arrays)}")
    samples = len(arrays["samples"]) if arrays["samples"].ndim else 0
    length = arrays["losses"].shape[-1] if arrays["losses"].ndim else 0
    for name, array in arrays.items():
        kind, more = ARRAYS[name]
        shape = (samples,) if more is None else (samples, length + more)
        if array.dtype != kind or array.shape != shape or not array.size:
            raise UserError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}, not {kind} {list(shape)}"
            )
    if arrays["tokens"].min() < 0 or arrays["samples"].min() < 0:
        raise UserError(f"{path} has numbers of tokens or samples below 0")
    if not arrays["valid"].any():
        raise UserError(f"{path} has no token that counts")


def read_dumps(
    directory: Path, iterations: list[int] | None = None, most: int | None = None
) -> list[TokenDump]:
    """Read the dumps of a directory, in the order of their iterations.

    Args:
        directory: the directory.
        iterations: iterations of the dumps wanted; None for all.
        most: largest number to read, evenly spread from the first to the last; None for all.

    Raises:
        UserError: there are none, one is damaged, they are of different samples, or too large.
    """
    paths = sorted(directory.glob("iter_*.safetensors"), key=lambda path: (len(path.name), path))
    if iterations is not None:
        paths = [dump_path(directory, iteration) for iteration in sorted(iterations)]
    if not paths:
        raise UserError(f"{directory} has no token dumps (iter_*.safetensors)")
    if most is not None and len(paths) > most:
        paths = [paths[round(at)] for at in np.linspace(0, len(paths) - 1, most).tolist()]
    if sum(path.stat().st_size for path in paths if path.exists()) > MOST_BYTES_OF_ALL:
        raise UserError(f"the token dumps in {directory} have more than {MOST_BYTES_OF_ALL} bytes")
    dumps = [read_dump(path) for path in paths]
    for path, dump in zip(paths, dumps, strict=True):
        if not _is_of_the_same_run(dump, dumps[0]):
            raise UserError(
                f"{path} has other samples or other parts than {paths[0]}: they are of different "
                "runs; keep each run's in a directory of its own"
            )
    return dumps


def _is_of_the_same_run(dump: TokenDump, other: TokenDump) -> bool:
    """Return whether two dumps have the same arrays for the same samples."""
    fixed = ("tokens", "valid", "samples")
    return all(
        (getattr(dump, name) is None) == (getattr(other, name) is None) for name in OPTIONAL
    ) and all(np.array_equal(getattr(dump, name), getattr(other, name)) for name in fixed)
