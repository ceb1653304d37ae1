"""Values of Arrow columns as the values that the same rows have in JSON Lines.

Arrow has kinds of values that JSON has not: a map is read as a list of pairs, and `datasets` writes
objects of mixed kinds as text with the extension type `arrow.json`. Both are objects again here.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from toolkit.data.prepare.text.json_text import decode_loosely
from toolkit.errors import DataError

Convert = Callable[[Any, str], Any]
"""What `as_py` gives, and the place of the row for messages, to the value as JSON has it."""


def conversion(kind: Any) -> Convert | None:
    """The conversion of values of the Arrow type `kind`; None: `as_py` gives them as they are."""
    import pyarrow.types as types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _from_json
    if types.is_map(kind):
        return _map(conversion(kind.item_type))
    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        found = {field.name: conversion(field.type) for field in fields}
        return _struct({name: c for name, c in found.items() if c is not None})
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _list(conversion(kind.value_type))
    return None


def _from_json(value: Any, place: str) -> Any:
    if value is None:
        return None
    try:
        return decode_loosely(value)
    except msgspec.DecodeError as error:
        raise DataError(f"{place}: a value of type arrow.json is not valid JSON: {error}") from None


def _map(convert: Convert | None) -> Convert:
    def from_pairs(value: Any, place: str) -> Any:
        if value is None:
            return None
        found = {}
        for key, inner in value:
            if key in found:
                raise DataError(f"{place}: the key {key!r} stands twice in one map; repair the row")
            found[key] = inner if convert is None else convert(inner, place)
        return found

    return from_pairs


def _struct(conversions: dict[str, Convert]) -> Convert | None:
    if not conversions:
        return None

    def fields(value: Any, place: str) -> Any:
        if value is None:
            return None
        return value | {name: convert(value[name], place) for name, convert in conversions.items()}

    return fields


def _list(convert: Convert | None) -> Convert | None:
    if convert is None:
        return None
    return lambda value, place: None if value is None else [convert(v, place) for v in value]
