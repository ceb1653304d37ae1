"""TensorBoard's files of events, written without its library: protocol buffers and checksums of a
step would cost more than all else that is done with its metrics."""

import functools
import math
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from toolkit.metrics.lines import Record, Sink

MAX_EVENT_BYTES = 4 << 20
"""A file of events that is as long is followed by another one. TensorBoard reads all of a folder;
who copies them need not copy all of them again."""
_PIECE = 512
"""Bytes that one look into a table of checksums serves."""

_FLOAT, _DOUBLE = struct.Struct("<f"), struct.Struct("<d")


class TensorBoardSink(Sink):
    """Writes event files that TensorBoard reads: one `Event` with all numbers of a record.

    `purge_step`: TensorBoard forgets what earlier files of the folder hold from this step on (a
    resumed run writes those steps again).
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        super().__init__(folder)
        self._purge_step = purge_step

    def write(self, records: list[Record]) -> None:
        """Append one event per record at its "step".

        "time" (Unix seconds), if there, is the event's wall time; a text "name" is the prefix of
        the tags; values that are not numbers are left out.
        """
        if not records:
            return
        if self._file is not None and self._file.tell() >= MAX_EVENT_BYTES:
            self.close()
            self._file, self._purge_step = None, None
        events = []
        if self._file is None:
            now = time.time()
            self._open(now)
            events.append(_event(now, 0, _FILE_VERSION))
            if self._purge_step is not None:
                events.append(_event(now, self._purge_step, _SESSION_START))
        events += [_event_of(record) for record in records]
        self._append(framed(events))

    def _open(self, now: float) -> None:
        self._path.mkdir(exist_ok=True)  # not its parents: a run that is gone stays so
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        unique = len(list(self._path.glob(f"{name}.*")))
        self._file = (self._path / f"{name}.{unique}").open("xb", buffering=0)


# Fields are a byte (number << 3 | kind) and a value; kinds: 0 varint, 1 eight bytes, 2 a length and
# as many bytes, 5 four bytes. Names as in tensorflow/core/util/event.proto and
# tensorflow/core/framework/summary.proto.
_FILE_VERSION = b"\x1a\x0dbrain.Event:2"
_SESSION_START = b"\x3a\x02\x08\x01"  # session_log {status: START}


def _event(wall_time: float, step: int, rest: bytes) -> bytes:
    # An int64: a negative one is its two's complement.
    number = min(max(int(step), -(2**63)), 2**63 - 1) % 2**64
    place = b"\x10" + _varint(number) if number else b""
    return b"".join((b"\x09", _packed(_DOUBLE, wall_time), place, rest))


def _packed(kind: struct.Struct, value: float) -> bytes:
    """What is too large for a float is infinite."""
    try:
        return kind.pack(value)
    except (OverflowError, struct.error):  # the latter of an int
        return kind.pack(math.inf if value > 0 else -math.inf)


def _event_of(record: Record) -> bytes:
    name = record.get("name")
    prefix = f"{name}/" if isinstance(name, str) else ""
    parts = []
    for key, value in record.items():
        if isinstance(value, float | int) and key not in ("step", "time"):
            parts.append(_head_of_value(prefix + key))
            parts.append(_packed(_FLOAT, value))
    summary = b"".join(parts)
    when = record.get("time") or time.time()
    return _event(when, record["step"], b"\x2a" + _varint(len(summary)) + summary)


@functools.lru_cache(maxsize=1 << 16)
def _head_of_value(tag: str) -> bytes:
    """All of a value in a summary but the four bytes of its number."""
    text = tag.encode(errors="replace")  # half a pair of UTF-16 is no text
    value = b"\x0a" + _varint(len(text)) + text + b"\x15"
    return b"\x0a" + _varint(len(value) + _FLOAT.size) + value


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def framed(events: Sequence[bytes]) -> bytes:
    """Records of a TFRecord file: length, its checksum, data, its checksum
    (tensorflow/core/lib/io/record_writer.h)."""
    sums = masked_crc32c(events)
    heads = map(_framed_length, map(len, events))
    return b"".join(part for frame in zip(heads, events, sums, strict=True) for part in frame)


@functools.lru_cache
def _framed_length(size: int) -> bytes:
    length = struct.pack("<Q", size)
    return length + masked_crc32c([length])[0]


def masked_crc32c(texts: Sequence[bytes]) -> list[bytes]:
    """CRC-32C (RFC 3720) of each text, rotated and shifted as in tensorflow/core/lib/hash/crc32c.h.

    As `tensorboard`'s own, whose loop in Python takes many times as long and stops all threads
    meanwhile. The CRC is linear: the XOR of what each byte contributes by its value and its place.
    A zero contributes nothing, so texts of unequal length begin with zeros here.
    """
    width = max(1, -(-max(map(len, texts)) // _PIECE)) * _PIECE
    # It begins with a register of ones, that is, with the first four bytes inverted.
    padded = [bytes(width - len(t)) + t[:4].translate(_INVERTED) + t[4:] for t in texts]
    data = np.frombuffer(bytearray().join(padded), np.uint8).reshape(len(texts), width)
    (table, places), crc = _contributions(), np.zeros(len(texts), "<u4")
    for begin in range(0, width, _PIECE):
        piece = data[:, begin : begin + _PIECE]
        piece[:, :4] ^= crc.view(np.uint8).reshape(-1, 4)
        crc = np.bitwise_xor.reduce(table[places + piece], axis=1)
    left = np.array([0xFFFFFFFF >> 8 * min(len(text), 4) for text in texts], np.uint32)
    crc ^= ~left  # what a shorter text leaves of the ones; and all bits are inverted at the end
    masked = (((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)).astype("<u4").tobytes()
    return [masked[at : at + 4] for at in range(0, len(masked), 4)]


_INVERTED = bytes(range(255, -1, -1))


@functools.cache
def _contributions() -> tuple[np.ndarray, np.ndarray]:
    """Of byte values (256) at each place of a piece, from the first; and where each place begins
    in this table."""
    last: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = (last >> 1) ^ (last & 1) * np.uint32(0x82F63B78)
    places = [last]
    for _ in range(_PIECE - 1):
        places.append(last[places[-1] & 0xFF] ^ (places[-1] >> 8))
    return np.concatenate(places[::-1]), np.arange(_PIECE) * 256
