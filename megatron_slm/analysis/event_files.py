"""Read the scalars of TensorBoard's event files, in bounded memory and time.

A file is a sequence of records: length, CRC-32C of it, an Event in protobuf, CRC-32C of that.  A
run that was killed, or whose disk was full, leaves half a record at the end of its file, and goes
on in another file.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_slm.errors import UserError
from megatron_slm.files import open_regular

EVENTS = "events.out.tfevents.*"
LONGEST = 1 << 20  # bytes of an event that is read: one with scalars is far shorter
MOST_VALUES, MOST_TAGS = 10_000_000, 10_000  # of a directory
LAST_ITERATION = 1 << 50
# Of every scalar there is a second curve, over samples.
OTHER_AXIS = " vs samples"
HEAD, CRC = struct.Struct("<QI"), struct.Struct("<I")

Scalars = dict[str, dict[int, float]]


def read_scalars(directory: Path) -> Scalars:
    """Return the values of each tag by iteration, in its order.

    A resumed run writes some iterations again: the later ones count.

    Raises:
        UserError: a file is no event file, is damaged, or there are too many values.
    """
    found: Scalars = defaultdict(dict)
    read = 0
    for path in sorted(directory.glob(EVENTS)):  # their names begin with the time
        for event in _events(path):
            values = event.summary.value
            read += max(1, len(values))
            for value in values:
                if value.HasField("simple_value") and not value.tag.endswith(OTHER_AXIS):
                    found[value.tag][event.step] = value.simple_value
            if read > MOST_VALUES or len(found) > MOST_TAGS:
                raise UserError(
                    f"{directory} has more than {MOST_VALUES:,} values or {MOST_TAGS:,} tags: more "
                    "than are read; log fewer, with --tensorboard-log-interval"
                )
    return {tag: dict(sorted(values.items())) for tag, values in found.items()}


def _events(path: Path) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    with open_regular(path) as file:
        for content in _records(file, path):
            try:
                event = Event.FromString(content)
            except DecodeError as error:
                raise _damaged(path, file.tell()) from error
            if not 0 <= event.step <= LAST_ITERATION:
                raise _damaged(path, file.tell())
            yield event


def _records(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the records up to the end of the file or half a record; long ones are passed over."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    size = os.fstat(file.fileno()).st_size
    while len(head := file.read(HEAD.size)) == HEAD.size:
        length, crc = HEAD.unpack(head)
        if masked_crc32c(head[:8]) != crc:
            raise _damaged(path, file.tell())
        if length + CRC.size > size - file.tell():
            return
        if length > LONGEST:
            file.seek(length + CRC.size, os.SEEK_CUR)
            continue
        content = file.read(length)
        if CRC.pack(masked_crc32c(content)) != file.read(CRC.size):
            raise _damaged(path, file.tell())
        yield content


def _damaged(path: Path, place: int) -> UserError:
    return UserError(
        f"{path} is no file of TensorBoard's events, or damaged before byte {place}; move it "
        "away to go on without it"
    )
