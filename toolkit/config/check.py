"""Checks plain data against a config type before it is converted.

msgspec converts exactly and fast, but says `Invalid enum value 'foo'` where a user needs the valid
ones. This walk finds the same mistakes and words them: path, value, what was expected, and the
nearest name.
"""

import math
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from toolkit.config.types import (
    FieldError,
    alternatives,
    choose_struct,
    describe,
    field_types,
    item_type,
    join,
    listing,
    nearest,
    struct_types,
    tags,
    unknown_field,
    value_type,
)

T = TypeVar("T")
_INT64 = range(-(2**63), 2**63)


def convert(data: Any, config_type: type[T]) -> T:
    """`data` (plain JSON types) as a `config_type`.

    Raises:
        FieldError: naming the path, the value and what was expected.
    """
    check(data, msgspec.inspect.type_info(config_type))
    try:
        return msgspec.convert(data, config_type)
    except msgspec.ValidationError as error:
        # What is left are the __post_init__ checks, which know fields but not their path.
        message, _, where = str(error).partition(" - at `")
        path = where.rstrip("`").removeprefix("$").lstrip(".").replace("[", ".").replace("]", "")
        raise FieldError(path, message.replace("`", "")) from None


def check(data: Any, target: Any, path: str = "") -> None:
    """Raise `FieldError` for the first name or value in `data` that does not fit `target`."""
    if isinstance(data, dict):
        _check_mapping(data, target, path)
    elif isinstance(data, list) and item_type(target, 0) is not None:
        for option in alternatives(target):
            if isinstance(option, inspect.TupleType) and len(data) != len(option.item_types):
                raise FieldError(path, f"expected {describe(target)} values, not {data!r}")
        for index, value in enumerate(data):
            check(value, item_type(target, index), join(path, index))
    elif not any(_fits(data, option) for option in alternatives(target)):
        raise FieldError(path, _mismatch(data, target))
    elif isinstance(data, float) and not math.isfinite(data):
        raise FieldError(path, f"must be a finite number, not {data}")
    elif isinstance(data, int) and data not in _INT64:
        raise FieldError(path, f"must fit in 64 bits, not {data}")


def _check_mapping(data: dict[str, Any], target: Any, path: str) -> None:
    structs = struct_types(target)
    if not structs:
        values = value_type(target)
        if values is None and not any(isinstance(t, inspect.AnyType) for t in alternatives(target)):
            raise FieldError(path, _mismatch(data, target))
        for name, value in data.items():
            if values is not None:
                check(value, values, join(path, name))
        return
    struct = choose_struct(target, data)
    if struct is None or data.get(struct.tag_field or "", struct.tag) != struct.tag:
        _raise_wrong_tag(data, target, path)
        return
    fields = field_types(struct)
    for name in data:
        if name not in fields:
            raise unknown_field(path, name, [struct])
    for name, value in data.items():
        check(value, fields[name], join(path, name))
    for field in struct.fields:
        if field.required and field.encode_name not in data:
            raise FieldError(
                join(path, field.encode_name),
                f"required, and not given (expected {describe(field.type)})",
            )


def _raise_wrong_tag(data: dict[str, Any], target: Any, path: str) -> None:
    tag_field = struct_types(target)[0].tag_field or ""
    where = join(path, tag_field)
    if tag_field not in data:
        raise FieldError(where, f"required, and not given; one of {listing(tags(target))}")
    raise FieldError(where, _not_one_of(data[tag_field], tags(target)))


def _mismatch(data: Any, target: Any) -> str:
    literals = [t for t in alternatives(target) if isinstance(t, inspect.LiteralType)]
    if literals and isinstance(data, str):
        return _not_one_of(data, [v for t in literals for v in t.values])
    shown = "null" if data is None else str(data).lower() if isinstance(data, bool) else repr(data)
    hint = f"; write [{data}]" if isinstance(data, str) and describe(target) == "a list" else ""
    return f"expected {describe(target)}, not {shown}{hint}"


def _not_one_of(value: Any, known: Any) -> str:
    near = nearest(str(value), [str(v) for v in known])
    hint = f"; did you mean {near!r}?" if near else ""
    return f"{value!r} is not one of {listing(known)}{hint}"


def _fits(data: Any, option: Any) -> bool:
    if isinstance(option, inspect.AnyType):
        return True
    if isinstance(option, inspect.LiteralType):
        return isinstance(data, str | int) and data in option.values
    if isinstance(option, inspect.FloatType):
        return isinstance(data, float | int) and not isinstance(data, bool)
    if isinstance(option, inspect.IntType):
        return isinstance(data, int) and not isinstance(data, bool)
    kinds: dict[type, type] = {
        inspect.BoolType: bool,
        inspect.StrType: str,
        inspect.NoneType: type(None),
    }
    kind = kinds.get(type(option))
    return kind is not None and isinstance(data, kind)
