"""Metrics files after a crash: no torn line, and no step that will be recorded again."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from toolkit.errors import RunError
from toolkit.storage.foreign import MAX_LINE_BYTES, check_regular, guard

_BLOCK = 1 << 16


class TrimResult(NamedTuple):
    """Lines that went."""

    dropped: int
    """Whole ones, of steps after the last one."""
    damaged: int
    """Torn or unreadable ones."""


class _Line(msgspec.Struct):
    step: float | None = None


_DECODER = msgspec.json.Decoder(_Line)


def trim_jsonl(path: Path, *, last_step: int) -> TrimResult:
    """Cut off the lines at the end that are damaged or have a "step" greater than `last_step`.

    Lines are in step order, so what comes before the last one that stays, stays too: it is not
    read, and a long file takes no longer than a short one. A file that does not exist has no lines.
    """
    if not path.exists():
        return TrimResult(0, 0)
    counts = {"dropped": 0, "damaged": 0}
    with guard(path, RunError):
        check_regular(path, RunError)
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        last = b"\n"
        for start, line in _lines_from_the_end(file, path):
            verdict = _judge(line, last_step)
            if verdict == "kept":
                last = line
                break
            counts[verdict] += 1
            end = start
        if end < size:
            file.truncate(end)
        if not last.endswith(b"\n"):
            file.seek(end)
            file.write(b"\n")
        if end < size or not last.endswith(b"\n"):
            file.flush()
            os.fsync(file.fileno())
    return TrimResult(**counts)


def _lines_from_the_end(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
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


def _judge(line: bytes, last_step: int) -> str:
    try:
        step = _DECODER.decode(line).step
    except (msgspec.MsgspecError, RecursionError):
        return "damaged"
    return "dropped" if step is not None and step > last_step else "kept"
