"""Read files that others wrote, within bounds, and write files whole.

A file that this process did not just write may be a pipe, larger than memory, nested a hundred
thousand levels deep, or not what its name promises.  So each kind of file has one reader, which
opens a regular file of bounded size and decodes it into a declared type before anything uses it.
Output is written under a name of this process's own, synced to the disk, and only then given its
final name, so that a reader finds either the old content or the new.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import yaml

from megatron_slm.errors import UserError

LIMIT = 64 << 20  # bytes: no configuration or manifest is larger
_NAMED = re.compile(r"\.(?P<place>[^.]*)-(?P<process>\d+)\.partial$")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file (or a link to one) for reading, without waiting on a pipe or device.

    Raises:
        UserError: it cannot be opened, or is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"cannot read {path}: it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, limit: int = LIMIT) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    with open_regular(path) as file:
        try:
            # read() takes as much memory as it is asked for, however small the file is.
            content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise UserError(f"{path} has more than {limit} bytes, too many for a file of its kind")
    return content


def decode_json[T](content: bytes | str, kind: type[T], where: Path | str) -> T:
    """Decode JSON into a type: a msgspec.Struct, a dataclass, or built-in types with parameters.

    Types are strict: a number does not pass for text, nor true for 1.

    Args:
        content: the JSON text.
        kind: the type to decode it into.
        where: the name of its file, for the error.

    Raises:
        UserError: it is not JSON, is nested too deeply, or is not of this type; names the place in
            it.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {_in_words(error)}") from error


def read_json[T](path: Path, kind: type[T], limit: int = LIMIT) -> T:
    """Read a JSON file into a type, as decode_json does.

    Raises:
        UserError: it cannot be read, is too large, or is not of this type.
    """
    return decode_json(read_bounded(path, limit), kind, path)


def read_yaml[T](path: Path, kind: type[T], limit: int = 1 << 20) -> T:
    """Read a YAML file without aliases into a type, with the types that decode_json takes.

    Raises:
        UserError: it cannot be read, is too large, has an alias, or is not of this type.
    """
    content = read_bounded(path, limit)
    try:
        return msgspec.convert(yaml.load(content, _LoaderWithoutAliases), kind)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {_in_words(error)}") from error


class _LoaderWithoutAliases(yaml.SafeLoader):
    """A YAML loader that refuses aliases, and keys that occur twice.

    Ten lines of aliases can stand for more values than fit into memory.  Of a key that occurs
    twice, YAML would silently take the last.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: the alias *{event.anchor} is not allowed; "
                "write the value out"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key.value!r} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _in_words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())


def inside(directory: Path, name: str) -> Path:
    """Return the path of a file that another file of `directory` names.

    Raises:
        UserError: the name leads out of the directory.
    """
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{directory} names a file {name!r}, which is not inside the directory")
    return directory / name


def sync(descriptor: int) -> None:
    """Wait until a file or directory is on the disk."""
    os.fsync(descriptor)


@cache
def _place() -> str:
    """Return a name for the place in which process ids are unique, until it is started again.

    The host's name is not enough: containers may share it together with a file system.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    host = socket.gethostname().replace(".", "-")
    return f"{host}-{hashlib.sha256(boot.encode()).hexdigest()[:8]}"


def temporary(path: Path) -> Path:
    """Return the name under which this process, and no other, writes an output."""
    return path.with_name(f"{path.name}.{_place()}-{os.getpid()}.partial")


def is_leftover(path: Path) -> bool:
    """Return whether a file is an unfinished output of this process, or of one that ended here."""
    named = _NAMED.search(path.name)
    if named is None or named["place"] != _place():
        return False
    return int(named["process"]) == os.getpid() or not Path("/proc", named["process"]).exists()


def leftovers(path: Path) -> list[Path]:
    """Return what is there of an output that this process, or one that ended here, left
    unfinished."""
    named = path.parent.glob(f"{escape(path.name)}.*.partial")
    return [each for each in named if is_leftover(each)]


def publish(unfinished: Path, final: Path) -> None:
    """Give a complete and synced file its final name, durably."""
    unfinished.replace(final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        sync(directory)
    finally:
        os.close(directory)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield the name to write a file under, and give it its final name, durably, after the block.

    If the block fails, what it wrote is removed, and what stood at `path` stays as it was.

    Raises:
        UserError: the file cannot be written: no space, no permission, a directory in its place.
    """
    unfinished = temporary(path)
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            sync(file.fileno())
        publish(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, durably.

    Raises:
        UserError: it cannot be written; what stood there stays as it was.
    """
    with writing(path) as unfinished:
        unfinished.write_bytes(content)


def make_directory(directory: Path, flag: str) -> None:
    """Make a directory, with those above it, and check that files can be made in it.

    Args:
        directory: the directory, which may be there already.
        flag: the option that names it, for the error.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {directory} cannot be written to")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file of any size, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def alone_at(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Make sure that no other run on this machine writes an output while the block lasts.

    Holds a name that the system frees when the last process of the run ends, however it ends.  A
    lock on a file could outlive its machine on some network file systems.

    Args:
        path: the output; its directory exists.
        what: the flag that names the output, for the error.
        wait: seconds to wait for another run to end.

    Raises:
        UserError: another run is still writing the output.
    """
    directory = path.parent.stat()
    place = os.fsencode(f"{directory.st_dev} {directory.st_ino} {path.name}")
    name = f"\0megatron-slm {hashlib.sha256(place).hexdigest()}"
    deadline = time.monotonic() + wait
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind(name)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # this system has no such names
                    break
            if time.monotonic() > deadline:
                raise UserError(
                    f"{what}: another run on this machine is writing {path}; wait for its end, or "
                    "choose another"
                )
            time.sleep(0.05)
        yield
