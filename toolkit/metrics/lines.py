"""Files of metrics, one JSON object a line: appended, read back, and cut after a crash."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from toolkit.errors import RunError
from toolkit.storage.atomic import fsync_folder
from toolkit.storage.foreign import MAX_LINE_BYTES, check_regular, guard, read_lines

Record = dict[str, Any]
T = TypeVar("T")

_BLOCK = 1 << 16


class _Line(msgspec.Struct):
    step: float | None = None


_STEP = msgspec.json.Decoder(_Line)
_UNREADABLE = (msgspec.MsgspecError, RecursionError)


class Sink:
    """One file that records are appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without a buffer: what a full disk refused must not come again when the file is closed.
        self._file: Any = None

    def write(self, records: list[Record]) -> None:
        """Append `records` and hand them to the operating system."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make what was written durable."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; more than once is fine."""
        if self._file is not None and not self._file.closed:
            with self._file:
                self.sync()

    def _append(self, data: bytes) -> None:
        """An unbuffered file may take a part at a time. Errors name the path."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


class JsonlSink(Sink):
    """Appends one JSON object per line.

    Non-finite numbers become the strings "nan", "inf" and "-inf": JSON has none, and a reader's
    `float(value)` gives them back.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._name_is_durable = False
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)

    def write(self, records: list[Record]) -> None:
        lines = [self._encoder.encode(_finite(record)) + b"\n" for record in records]
        self._append(b"".join(lines))

    def sync(self) -> None:
        super().sync()
        if not self._name_is_durable:
            fsync_folder(self._path.parent)
            self._name_is_durable = True


def read_records(path: Path, kind: type[T]) -> Iterator[T]:
    """The lines of a file as `kind`, in order; damaged ones, and one that is being written, are
    left out. None where there is no file. Raises RunError where it is a pipe or a device, or has a
    line without end."""
    decoder = msgspec.json.Decoder(kind)
    for line in read_lines(path, RunError):
        with contextlib.suppress(*_UNREADABLE):
            yield decoder.decode(line)


def last_record(path: Path) -> Record:
    """The last whole line with a step; empty where there is none, or no file that can be read."""
    with contextlib.suppress(OSError, RunError):
        check_regular(path, RunError)
        with path.open("rb") as file:
            for _, line in _from_the_end(file, path):
                with contextlib.suppress(*_UNREADABLE):
                    if line.endswith(b"\n") and _STEP.decode(line).step is not None:
                        return msgspec.json.decode(line)
    return {}


class TrimResult(NamedTuple):
    """Lines that went."""

    dropped: int = 0
    """Whole ones, of steps after the last one."""
    damaged: int = 0
    """Torn or unreadable ones."""


def trim_jsonl(path: Path, *, last_step: int) -> TrimResult:
    """Cut off the lines at the end that are damaged or have a "step" greater than `last_step`.

    Lines are in step order, so what comes before the last one that stays is not read. A file that
    does not exist has no lines.
    """
    if not path.exists():
        return TrimResult()
    with guard(path, RunError):
        check_regular(path, RunError)
    dropped = damaged = 0
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        newline = b""
        for start, line in _from_the_end(file, path):
            try:
                step = _STEP.decode(line).step
            except _UNREADABLE:
                damaged += 1
            else:
                if step is None or step <= last_step:
                    newline = b"" if line.endswith(b"\n") else b"\n"
                    break
                dropped += 1
            end = start
        if end < size or newline:
            file.truncate(end)
            file.seek(end)
            file.write(newline)
            file.flush()
            os.fsync(file.fileno())
    return TrimResult(dropped, damaged)


def _from_the_end(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """`(offset, line)` of each line, the last first."""
    end = file.seek(0, os.SEEK_END)
    rest = b""  # the beginning of a block, whose line may begin in the block before
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        lines = (file.read(end - start) + rest).splitlines(keepends=True)
        rest = lines.pop(0) if start > 0 else b""
        if len(rest) > MAX_LINE_BYTES:
            raise RunError(
                f"{path}: has a line of more than {MAX_LINE_BYTES:,} bytes; move it away"
            )
        offset = start + len(rest) + sum(map(len, lines))
        for line in reversed(lines):
            offset -= len(line)
            yield offset, line
        end = start


def _finite(value: Any) -> Any:
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        # Most values need no call.
        return {
            k: v if type(v) is int or (type(v) is float and math.isfinite(v)) else _finite(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as Python numbers."""
    if hasattr(value, "item"):
        return _finite(value.item())
    raise TypeError(f"{type(value).__name__} cannot be written as a metric")
