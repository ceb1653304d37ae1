"""Metrics files after a crash: no torn line, and no step that will be recorded again."""

from pathlib import Path
from typing import NamedTuple

import msgspec

from toolkit.storage.atomic import open_atomic


class TrimResult(NamedTuple):
    """Lines of a file by what became of them."""

    kept: int
    dropped: int
    """Whole lines of steps after the last one."""
    damaged: int
    """Torn or unreadable lines, dropped too."""


class _Line(msgspec.Struct):
    step: float | None = None


_DECODER = msgspec.json.Decoder(_Line)


def trim_jsonl(path: Path, *, last_step: int) -> TrimResult:
    """Drop lines whose "step" is greater than `last_step`, and damaged ones; keep all others.

    The file changes atomically, or not at all when it is as it should be. Memory does not grow
    with the file. A file that does not exist has no lines.
    """
    if not path.exists():
        return TrimResult(0, 0, 0)
    result, complete = _count(path, last_step)
    if result.dropped or result.damaged or not complete:
        with path.open("rb") as source, open_atomic(path) as target:
            for line in source:
                if _judge(line, last_step) == "kept":
                    target.write(line.rstrip(b"\n") + b"\n")
    return result


def _count(path: Path, last_step: int) -> tuple[TrimResult, bool]:
    counts = {"kept": 0, "dropped": 0, "damaged": 0}
    line = b"\n"
    with path.open("rb") as file:
        for line in file:
            counts[_judge(line, last_step)] += 1
    return TrimResult(**counts), line.endswith(b"\n")


def _judge(line: bytes, last_step: int) -> str:
    try:
        step = _DECODER.decode(line).step
    except msgspec.MsgspecError:
        return "damaged"
    return "dropped" if step is not None and step > last_step else "kept"
