"""Files that may come from elsewhere: whatever is wrong with one becomes an error of one line.

A file that someone else wrote can be of any size, nested to any depth, a pipe that never ends, or
make the library that reads it fail in a way of its own. Every reader of such files stands behind
`guard`; small ones are read by `read_bytes` and `read_json`.
"""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec

from toolkit.errors import ToolkitError

MAX_BYTES = 64 << 20
"""Of a file that describes others: JSON in memory takes up to thirty times its size."""

MAX_LINE_BYTES = 1 << 20
"""Of a record in a file of metrics."""

_SHOWN = 300
"""Characters of what another library says."""

_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[][{}]")

T = TypeVar("T")


@contextlib.contextmanager
def guard(
    where: object,
    kind: type[ToolkitError],
    advice: str = "",
    *,
    problem: str = "cannot be read",
) -> Iterator[None]:
    """Any failure inside becomes `kind` with one line: `where`, `problem`, the reason, `advice`.

    Our own errors pass. Native code of `tokenizers` and `safetensors` panics with an exception that
    is no `Exception`; it is caught here too.
    """
    try:
        yield
    except ToolkitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        tail = f"; {advice}" if advice else ""
        raise kind(f"{where}: {problem}: {reason_of(error)}{tail}") from error


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line without control characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, json.JSONDecodeError):
        return f"JSONDecodeError: {error}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    line = "".join(c if c.isprintable() else " " for c in str(error))
    line = " ".join(line.split())
    return (line if len(line) <= _SHOWN else line[:_SHOWN] + "...") or type(error).__name__


def read_bytes(path: Path, kind: type[ToolkitError], *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        kind: it is a folder, pipe or device, larger than `max_bytes`, or cannot be read.
    """
    with guard(path, kind), contextlib.suppress(FileNotFoundError):
        size = check_regular(path, kind)
        if size > max_bytes:
            raise kind(
                f"{path}: has {size:,} bytes; such a file never needs more than {max_bytes:,}"
            )
        with path.open("rb") as file:
            return file.read(size)  # a buffer of as many bytes is made first
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def check_regular(path: Path, kind: type[ToolkitError]) -> int:
    """Bytes of a file, asked before it is opened: opening a pipe waits for its other end.

    Raises:
        FileNotFoundError: there is none.
        kind: it is a folder, pipe or device.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        what = "Is a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or a device, no file"
        raise kind(f"{path}: cannot be read: {what}")
    return status.st_size


@overload
def read_json(path: Path, kind: type[ToolkitError], *, max_bytes: int = ...) -> dict[str, Any]: ...
@overload
def read_json(
    path: Path, kind: type[ToolkitError], type: type[T], *, max_bytes: int = ...
) -> T: ...
def read_json(
    path: Path,
    kind: type[ToolkitError],
    type: Any = dict[str, Any],
    *,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """The JSON object in a file, as `type`.

    Raises:
        FileNotFoundError: there is none.
        kind: it cannot be read, or holds something else.
    """
    data = read_bytes(path, kind, max_bytes=max_bytes)
    return decode_json(data, path, kind, type)


def decode_json(data: bytes, where: object, kind: type[ToolkitError], type: Any) -> Any:
    """The JSON object `data`, which `where` holds, as `type`; raises `kind`."""
    with guard(where, kind):
        try:
            return msgspec.json.decode(data, type=type)
        except msgspec.ValidationError as error:
            raise kind(f"{where}: not the JSON that belongs there: {reason_of(error)}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise kind(f"{where}: not valid JSON: {reason_of(error)}") from None


def nesting(data: bytes | bytearray) -> int:
    """How deep the brackets of JSON or YAML flow `data` nest, those in double quotes left out."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(_QUOTED.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def read_lines(
    path: Path, kind: type[ToolkitError], *, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[bytes]:
    """The lines of a file of records, one after the other; none where there is no file.

    Raises:
        kind: it is a pipe or a device, or has a line of more than `max_bytes`.
    """
    with guard(path, kind):
        try:
            check_regular(path, kind)
            file = path.open("rb")
        except FileNotFoundError:
            return
    with file:
        while line := file.readline(max_bytes + 1):
            if len(line) > max_bytes:
                raise kind(f"{path}: has a line of more than {max_bytes:,} bytes; move it away")
            yield line
