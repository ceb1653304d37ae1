"""Where records end: lines of JSON, and TensorBoard event files."""

import functools
import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import msgspec

from toolkit.metrics.crc32c import masked_crc32c
from toolkit.storage.atomic import fsync_folder

Record = dict[str, Any]


class JsonlSink:
    """Appends one JSON object per line.

    Non-finite numbers become the strings "nan", "inf" and "-inf": JSON has none, and a reader's
    `float(value)` gives them back.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what a full disk refused must not come again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._path = path
        self._name_is_durable = False
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)

    def write(self, records: list[Record]) -> None:
        """Append `records` and hand them to the operating system."""
        encode = self._encoder.encode
        lines = [encode({k: _finite(v) for k, v in record.items()}) for record in records]
        _write_all(self._file, b"\n".join(lines) + b"\n" if lines else b"", self._path)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._file.fileno())
        if not self._name_is_durable:
            fsync_folder(self._path.parent)
            self._name_is_durable = True

    def close(self) -> None:
        """Sync and close; more than once is fine."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


class TensorBoardSink:
    """Writes event files that TensorBoard reads: one `Event` with all numbers of a record.

    `purge_step`: TensorBoard forgets what earlier files of the folder hold from this step on (a
    resumed run writes those steps again).
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._folder = folder
        self._purge_step = purge_step
        self._file: Any = None
        self._templates: dict[tuple[str, ...], Any] = {}

    def write(self, records: list[Record]) -> None:
        """Append one event per record at its "step".

        "time" (Unix seconds), if there, is the event's wall time; a text "name" is the prefix of
        the tags; values that are not numbers are left out.
        """
        if not records:
            return
        if self._file is None:
            self._open()
        data = b"".join(_framed(self._encode(record)) for record in records)
        _write_all(self._file, data, self._folder)

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; more than once is fine."""
        if self._file is not None and not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def _encode(self, record: Record) -> bytes:
        prefix = f"{record['name']}/" if isinstance(record.get("name"), str) else ""
        numbers = {
            prefix + key: value
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "time")
        }
        tags = tuple(numbers)
        event = self._templates.get(tags)
        if event is None:  # building the message costs five times more than filling it
            event = self._templates[tags] = _empty_event(tags)
        event.step = record["step"]
        event.wall_time = record.get("time") or time.time()
        for slot, number in zip(event.summary.value, numbers.values(), strict=True):
            slot.simple_value = number
        return event.SerializeToString()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(exist_ok=True)  # not its parents: a run that is gone stays so
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        unique = len(list(self._folder.glob(f"{name}.*")))
        self._file = (self._folder / f"{name}.{unique}").open("xb", buffering=0)
        head = [Event(wall_time=now, file_version="brain.Event:2")]
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            head.append(Event(wall_time=now, step=self._purge_step, session_log=start))
        data = b"".join(_framed(event.SerializeToString()) for event in head)
        _write_all(self._file, data, self._folder)


def _write_all(file: Any, data: bytes, path: Path) -> None:
    """Write to an unbuffered file, which may take a part at a time. Errors name `path`."""
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _empty_event(tags: tuple[str, ...]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(summary=Summary(value=[Summary.Value(tag=tag) for tag in tags]))


def _framed(data: bytes) -> bytes:
    """TFRecord framing: length, its CRC, data, its CRC (tensorflow/core/lib/io/record_writer)."""
    return b"".join((_frame_head(len(data)), data, struct.pack("<I", masked_crc32c(data))))


@functools.lru_cache(maxsize=1024)
def _frame_head(size: int) -> bytes:
    length = struct.pack("<Q", size)
    return length + struct.pack("<I", masked_crc32c(length))


def _finite(value: Any) -> Any:
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as Python numbers."""
    if hasattr(value, "item"):
        return _finite(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written as a metric")
