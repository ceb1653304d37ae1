"""JSON as programs write it: numbers that JSON does not have, and keys that stand twice.

`msgspec` decodes, because it is fast; it refuses NaN, Infinity and 1e999, wherever they stand, and
of a key that stands twice it keeps the last value without a word. Here the first are numbers (it
depends on the reader whether it needs them), and the second is found.
"""

import json
import re
from typing import Any

import msgspec

_SPACED_COLON = re.compile(rb'"\s+:')


class TooDeepError(msgspec.DecodeError):
    """Nested deeper than the interpreter can follow."""


class _Pairs(list[tuple[str, Any]]):
    """An object as the list of its keys and values."""


def decode_loosely(data: bytes | bytearray | str, decoder: Any = None) -> Any:
    """The value of `data`, in which a number may be NaN or infinite.

    Args:
        decoder: of `msgspec`, tried first.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: it is not JSON even so.
    """
    try:
        return msgspec.json.decode(data) if decoder is None else decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = lenient(data)
        if value is None:
            raise
        return value
    except RecursionError:
        raise TooDeepError("nested too deeply") from None


def lenient(data: bytes | bytearray | str) -> Any:
    """The value of `data` with numbers that JSON does not have; None: it is not JSON even so, or
    holds text with half a surrogate pair."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def repeated_key(data: bytes | bytearray, row: dict[str, Any]) -> str | None:
    """A key that stands twice in one object of `data`, which was decoded to `row`."""
    # A key is followed by a colon; one inside of text has a backslash before the quote.
    if data.count(b'":') == _num_keys(row) and not _SPACED_COLON.search(data):
        return None
    return _repeated(_pairs(data))


def repeats_field(data: bytes | bytearray, field: str) -> bool:
    """Whether the object in `data` has the key `field` more than once."""
    if data.count(msgspec.json.encode(field)) < 2:
        return False
    found = _pairs(data)
    return isinstance(found, _Pairs) and sum(key == field for key, _ in found) > 1


def _pairs(data: bytes | bytearray) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):  # the ordinary reader says what is wrong with it
        return None


def _repeated(value: Any) -> str | None:
    if isinstance(value, _Pairs):
        keys = [key for key, _ in value]
        if len(set(keys)) < len(keys):
            return next(key for key in keys if keys.count(key) > 1)
        value = [inner for _, inner in value]
    for inner in value if isinstance(value, list) else ():
        found = _repeated(inner)
        if found is not None:
            return found
    return None


def _num_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_num_keys, value.values()))
    return sum(map(_num_keys, value)) if isinstance(value, list) else 0
