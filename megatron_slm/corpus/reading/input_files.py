"""Find the files that --input names: each once, and none that this program wrote.

In directories and patterns, some files are passed over with a message: hidden ones (names that
begin with a dot, and directories that begin with an underscore, where Spark and Hive keep what is
not data), further paths of a file (links, hard links, mounts), what this program writes, and files
that another option names.  A file that --input names itself is read whatever its name is.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_slm.corpus.file_names import STDIN, is_output
from megatron_slm.corpus.progress import announce
from megatron_slm.corpus.reading.inputs import KINDS, NOT_READ
from megatron_slm.errors import UserError

NAMED = 3  # files named in a message about those passed over

Identity = tuple[int, int]  # device and inode, which do not depend on the path


@dataclass
class PassedOver:
    """The files that one input leaves out, by reason."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        self.reasons.setdefault(reason, []).append(path)

    def tell(self, name: str) -> None:
        """Say what was left out, if anything was."""
        parts = []
        for reason, paths in self.reasons.items():
            names = sorted({os.path.basename(path) for path in paths})
            more = ", ..." if len(names) > NAMED else ""
            parts.append(f"{len(paths)} {reason} ({', '.join(names[:NAMED])}{more})")
        if parts:
            announce(f"{name}: passed over {'; '.join(parts)}")


def find_files(
    inputs: Iterable[str], output_prefix: str | None = None, aside: Sequence[str] = ()
) -> list[str]:
    """Return every file once, in the order given; those of a directory or pattern are sorted.

    Args:
        inputs: files, directories and patterns.
        output_prefix: output of this run, which is not its input even if it is named.
        aside: files that the run uses for something else.

    Raises:
        UserError: an input does not exist, cannot be read, holds nothing, or is named twice.
    """
    not_input = {identity_of(path) for path in aside if os.path.isfile(path)}
    found: dict[Identity, str] = {}
    for name in inputs:
        passed = PassedOver()
        is_file = not os.path.isdir(name) and os.path.lexists(name)
        own: dict[Identity, str] = {}
        for path in [name] if is_file else _named_by(name, passed):
            identity = identity_of(path)
            if is_output(path) if not is_file else _is_of(output_prefix, path):
                passed.add("written by this program", path)
            elif identity in own:
                passed.add("other paths of files that are read", path)
            elif identity in not_input and not is_file:
                passed.add("named by another option", path)
            elif identity in not_input:
                raise UserError(f"--input names {path}, which another option names, too")
            elif identity in found:
                raise UserError(f"--input names {path} twice; its documents would count double")
            else:
                own[identity] = path
        passed.tell(name)
        if not own and not (is_file and passed.reasons):
            raise UserError(
                f"--input {name}: no such file, nothing matches, or a directory without any of "
                f"{', '.join(f'*{suffix}' for suffix in KINDS)}"
            )
        found |= own
    if not found:
        raise UserError("--input names nothing but what this program wrote")
    return list(found.values())


def identity_of(path: str) -> Identity:
    """Return what identifies a file or directory, whatever its path.

    Raises:
        UserError: it is a broken link, or cannot be accessed.
    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{os.fsencode(path)!r} is not UTF-8; rename it") from error
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            where = os.readlink(path)
            raise UserError(
                f"{path} is a link to {where}, which cannot be read ({error.strerror}): mend or "
                "remove it"
            ) from error
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _is_of(prefix: str | None, path: str) -> bool:
    """Return whether a file was written under an output prefix."""
    own = prefix is not None and os.path.abspath(path).startswith(f"{os.path.abspath(prefix)}_")
    return own and is_output(path) and os.path.basename(path) != STDIN


def _named_by(name: str, passed: PassedOver) -> Iterator[str]:
    """Yield the files of a directory, or of all that a pattern matches, sorted."""
    if os.path.isdir(name):
        yield from _files_below(name, passed)
        return
    for path in sorted(set(_matches(name, passed))):
        if _is_hidden_match(path, name):
            passed.add("hidden", path)
        elif os.path.isdir(path):
            yield from _files_below(path, passed)
        else:
            yield path


def _matches(pattern: str, passed: PassedOver) -> Iterator[str]:
    """Yield what a pattern matches.

    `**` visits each directory below once, however it is linked; glob itself would follow links in
    circles.
    """
    head, stars, tail = pattern.partition("**/")
    if stars and head[-1:] in ("", "/"):
        for top in glob.glob(head) if head else ["."]:
            for directory, _ in _walk(top, passed):
                if tail:
                    start = "" if directory == "." else f"{directory.removeprefix('./')}/"
                    yield from _matches(f"{glob.escape(start)}{tail}", passed)
                else:
                    yield directory
    else:
        yield from glob.glob(pattern)


def _is_hidden_match(path: str, pattern: str) -> bool:
    """Return whether a pattern's wildcards match a directory that holds no data."""
    parts = Path(path).parts
    if not os.path.isdir(path):
        parts = parts[:-1]
    own = [part for part in Path(pattern).parts if _is_hidden(part)]
    wild = (part for part in parts if _is_hidden(part))
    return not all(any(fnmatchcase(part, written) for written in own) for part in wild)


def _is_hidden(directory: str) -> bool:
    """Return whether a directory is hidden to Hadoop, Spark and Arrow: _temporary and _delta_log
    are, _column=value is not."""
    return directory.startswith(".") or (directory.startswith("_") and "=" not in directory)


def _files_below(directory: str, passed: PassedOver) -> list[str]:
    """Return the inputs in a directory, sorted."""
    found: list[Path] = []
    for root, names in _walk(directory, passed):
        for name in names:
            path = Path(root, name)
            known = path.suffix.lower() in (*KINDS, *NOT_READ)
            if name.startswith("."):
                if known:
                    passed.add("hidden", name)
            elif known:
                found.append(path)
            else:
                identity_of(str(path))  # a broken link to a directory is an error
                passed.add("files of other kinds", name)
    return [str(path) for path in sorted(found)]


def _walk(top: str, passed: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """Yield each directory that is not hidden once, with its files' names, following links."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen: set[Identity] = set()
    for root, directories, names in os.walk(top, onerror=refuse, followlinks=True):
        identity = identity_of(root)
        if identity in seen:
            directories.clear()
            continue
        seen.add(identity)
        if "executor.json" in names and "logs" in directories:
            passed.add("logs of datatrove", root)
            directories.clear()
            continue
        for name in filter(_is_hidden, directories):
            passed.add("hidden", name)
        directories[:] = sorted(name for name in directories if not _is_hidden(name))
        yield root, names
