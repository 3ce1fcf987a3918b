"""Read TensorBoard's event files, scalars and texts, in bounded memory and time.

A file is a sequence of records: length, CRC-32C of it, an Event in protobuf, CRC-32C of that.  A
run that was killed, or whose disk was full, leaves half a record at the end of its file, and goes
on in another file.
"""

from __future__ import annotations

import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_slm.errors import UserError
from megatron_slm.files import open_regular

EVENTS = "events.out.tfevents.*"
LONGEST = 1 << 20  # bytes of an event that is read: one with scalars is far shorter
MOST_VALUES, MOST_TAGS = 10_000_000, 10_000  # of a directory
LAST_ITERATION = 1 << 50
MOST_CHARACTERS = 10_000  # of a text
# Of every scalar there is a second curve, over samples.
OTHER_AXIS = " vs samples"
# Tags of the validation loss: one, or one a set (--multiple-validation-sets); not its perplexity.
VALIDATION = re.compile("lm loss validation(-.*)?(?<! ppl)(?<! vs samples)")
TEXT = "/text_summary"
HEAD, CRC = struct.Struct("<QI"), struct.Struct("<I")


@dataclass(frozen=True)
class Events:
    """scalars: values of each tag by iteration, in its order.  texts: the last of each tag."""

    scalars: dict[str, dict[int, float]]
    texts: dict[str, str]


def read_events(directory: Path) -> Events:
    """Read all event files of a directory.

    A resumed run writes some iterations again: the later ones count.

    Raises:
        UserError: a file is no event file, is damaged, or there are too many values.
    """
    scalars: dict[str, dict[int, float]] = defaultdict(dict)
    texts: dict[str, str] = {}
    read = 0
    for path in sorted(directory.glob(EVENTS)):  # their names begin with the time
        for event in _events(path):
            values = event.summary.value
            read += max(1, len(values))
            for value in values:
                if value.HasField("simple_value") and not value.tag.endswith(OTHER_AXIS):
                    scalars[value.tag][event.step] = value.simple_value
                elif value.tag.endswith(TEXT):
                    text = b"".join(value.tensor.string_val)[:MOST_CHARACTERS]
                    texts[value.tag.removesuffix(TEXT)] = text.decode(errors="replace")
            if read > MOST_VALUES or len(scalars) + len(texts) > MOST_TAGS:
                raise UserError(
                    f"{directory} has more than {MOST_VALUES:,} values or {MOST_TAGS:,} tags: more "
                    "than are read; log fewer, with --tensorboard-log-interval"
                )
    return Events({tag: dict(sorted(values.items())) for tag, values in scalars.items()}, texts)


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
