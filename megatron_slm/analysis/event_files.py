"""Read scalars and texts from TensorBoard's event files, in bounded memory and time.

A file is a sequence of records: the length of an event, the length's CRC-32C, the event as a
protobuf message, and the event's CRC-32C.  A run that was killed or ran out of disk space leaves
half a record at the end of its file, and a machine that stopped may leave zeros there; when the run
is resumed it starts another file.
"""

from __future__ import annotations

import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from megatron_slm.errors import UserError
from megatron_slm.files import open_regular

EVENTS = "events.out.tfevents.*"
LONGEST = 1 << 20  # bytes; longer events are skipped, since one with scalars is far shorter
MOST_VALUES, MOST_TAGS = 10_000_000, 10_000  # per directory
LAST_ITERATION = 1 << 50
MOST_CHARACTERS = 10_000  # kept of a text
# Megatron logs every scalar a second time, over samples instead of iterations.
OTHER_AXIS = " vs samples"
OVER_SAMPLES = OTHER_AXIS.encode()
# The validation loss has one tag, or one per set (--multiple-validation-sets).  The pattern leaves
# out its perplexity.
VALIDATION = re.compile("lm loss validation(-.*)?(?<! ppl)(?<! vs samples)")
TEXT = "/text_summary"
HEAD, CRC = struct.Struct("<QI"), struct.Struct("<I")


@dataclass(frozen=True)
class Events:
    """What the event files of a directory hold."""

    scalars: dict[str, dict[int, float]]
    """The values of each tag by iteration, in ascending order."""

    texts: dict[str, str]
    """The last text of each tag."""


def read_events(directory: Path) -> Events:
    """Read all event files of a directory.

    A resumed run writes some iterations again; the values written last are kept.  What an earlier
    file has of later iterations than those that a file begins with is left out, as TensorBoard
    does: the run went back, or was started anew.

    Raises:
        UserError: a file is not an event file or is damaged, or there are too many values.
    """
    scalars: dict[str, dict[int, float]] = defaultdict(dict)
    texts: dict[str, str] = {}
    read = 0
    for path in sorted(directory.glob(EVENTS)):  # names begin with the time of writing
        begun = False
        for event in _events(path):
            values = event.summary.value
            read += max(1, len(values))
            for value in values:
                if value.HasField("simple_value") and not value.tag.endswith(OTHER_AXIS):
                    if not begun:
                        _leave_out_after(event.step, scalars)
                        begun = True
                    scalars[value.tag][event.step] = value.simple_value
                elif value.tag.endswith(TEXT):
                    text = b"".join(value.tensor.string_val)[:MOST_CHARACTERS]
                    texts[value.tag.removesuffix(TEXT)] = text.decode(errors="replace")
            if read > MOST_VALUES or len(scalars) + len(texts) > MOST_TAGS:
                raise UserError(
                    f"{directory} has more than {MOST_VALUES:,} values or {MOST_TAGS:,} tags: more "
                    "than can be read; log fewer with a larger --tensorboard-log-interval"
                )
    kept = {tag: dict(sorted(values.items())) for tag, values in scalars.items() if values}
    return Events(kept, texts)


def _leave_out_after(step: int, scalars: dict[str, dict[int, float]]) -> None:
    """Remove the values of later steps, which each tag has at its end, in place."""
    for points in scalars.values():
        while points and next(reversed(points)) > step:
            points.popitem()


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
    """Yield the records up to the end of the file or an incomplete record.

    Overlong ones are skipped, and those over samples, of which no checksum is computed: that takes
    most of the time.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    of_length = lru_cache(masked_crc32c)
    size, begun = os.fstat(file.fileno()).st_size, False
    while len(head := file.read(HEAD.size)) == HEAD.size:
        length, crc = HEAD.unpack(head)
        whole = of_length(head[:8]) == crc
        if whole and length + CRC.size > size - file.tell():
            return
        if whole and length > LONGEST:
            file.seek(length + CRC.size, os.SEEK_CUR)
            continue
        content = file.read(length) if whole else b""
        if OVER_SAMPLES in content:
            file.seek(CRC.size, os.SEEK_CUR)
            continue
        if not whole or CRC.pack(masked_crc32c(content)) != file.read(CRC.size):
            place = file.tell()
            if begun and not file.read(LONGEST).strip(b"\0"):
                return  # the last record was not all on the disk when the machine stopped
            raise _damaged(path, place)
        begun = True
        yield content


def _damaged(path: Path, place: int) -> UserError:
    return UserError(
        f"{path} is not a TensorBoard event file, or is damaged before byte {place}; move it away "
        "to continue without it"
    )
