"""Checks plain data against a config type before it is converted.

msgspec converts exactly and fast, but stops at the first mistake and says `Invalid enum value
'foo'` where a user needs the valid ones. This walk finds the same mistakes, all of them, and words
them: path, value, what was expected, and the nearest name.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from toolkit.config.base import UNSIGNED
from toolkit.config.paths import NOTE, path_problem
from toolkit.config.types import (
    alternatives,
    choose_struct,
    describe,
    expanded,
    field_types,
    is_text,
    item_type,
    join,
    listing,
    nearest,
    note_of,
    shown,
    struct_types,
    tags,
    type_of,
    unknown_field,
    value_type,
)
from toolkit.errors import ConfigError, ErrorList

T = TypeVar("T")
_INT64 = range(-(2**63), 2**63)
_UINT64 = range(2**64)
_ANY = inspect.AnyType()
_WRONG: Any = object()
"""Stands for a value that does not fit."""


class Checked(NamedTuple):
    """What `check` found."""

    config: Any
    """The config, built without the values that do not fit; None where it needs one of them."""
    errors: list[ConfigError]


def convert(data: Any, config_type: type[T]) -> T:
    """`data` (plain JSON types) as a `config_type`.

    Raises:
        ConfigError: naming the path, the value and what was expected; `SeveralErrors` of them where
            more than one is wrong.
    """
    checked = check(data, config_type)
    ErrorList(checked.errors).raise_any()
    return checked.config


def check(data: Any, config_type: type) -> Checked:
    """Everything in `data` that does not fit `config_type`, and what can be made of the rest."""
    walk, target = _Walk(), type_of(config_type)
    data = expanded(data, target)
    fitting = walk.value(data, target, "")
    if not walk.errors:
        try:
            return Checked(msgspec.convert(data, config_type), [])
        except msgspec.ValidationError:
            pass  # what is left are the checks of the structs themselves
    if fitting is _WRONG:
        return Checked(None, walk.errors)
    settled = walk.settled(fitting, target, "")
    if settled is _WRONG:
        return Checked(None, walk.errors)
    return Checked(msgspec.convert(settled, config_type), walk.errors)


class _Walk:
    """Goes through data and its types side by side. `value` compares names and types, `settled`
    then runs `__post_init__` of every struct, inner ones first; both return what is right."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    def value(self, data: Any, target: Any, path: str) -> Any:
        """`data` without the names and values that do not fit `target`."""
        if isinstance(data, dict):
            return self._mapping(data, target, path)
        if isinstance(data, list) and (item_type(target, 0) is not None or _takes_any(target)):
            for option in alternatives(target):
                if isinstance(option, inspect.TupleType) and len(data) != len(option.item_types):
                    return self._wrong(
                        path, f"expected {describe(target)} values, not {shown(data)}"
                    )
            items = [
                self.value(item, item_type(target, index) or _ANY, join(path, index))
                for index, item in enumerate(data)
            ]
            return _WRONG if any(item is _WRONG for item in items) else items
        problem = _problem(data, target)
        return data if problem is None else self._wrong(path, problem)

    def settled(self, data: Any, target: Any, path: str) -> Any:
        """`data`, whose names and types fit, without what the structs themselves refuse."""
        if isinstance(data, list):
            items = [
                self.settled(item, item_type(target, index), join(path, index))
                for index, item in enumerate(data)
            ]
            return _WRONG if any(item is _WRONG for item in items) else items
        if not isinstance(data, dict):
            return data
        struct = choose_struct(target, data)
        fields = field_types(struct) if struct else {}
        values = {
            name: self.settled(value, fields.get(name, value_type(target)), join(path, name))
            for name, value in data.items()
        }
        values = {name: value for name, value in values.items() if value is not _WRONG}
        return values if struct is None else self._struct(values, struct, path)

    def _struct(self, values: dict[str, Any], struct: inspect.StructType, path: str) -> Any:
        required = {field.encode_name for field in struct.fields if field.required}
        while required <= values.keys():
            try:
                msgspec.convert(values, struct.cls)
            except msgspec.ValidationError as error:
                refused = set()
                for line in str(error).partition(" - at `")[0].splitlines():
                    name = line.partition(" ")[0].partition(".")[0].rstrip(":")
                    about = join(path, name) if name in values else path
                    self.errors.append(ConfigError(line.replace("`", ""), key=path, about=about))
                    refused.add(name)
                if not refused & values.keys():
                    return _WRONG
                # The checks behind the one that failed are made without the value it is about.
                values = {name: value for name, value in values.items() if name not in refused}
            else:
                return values
        return _WRONG

    def _mapping(self, data: dict[str, Any], target: Any, path: str) -> Any:
        structs = struct_types(target)
        if not structs:
            values = value_type(target)
            if values is None and not _takes_any(target):
                return self._wrong(path, _mismatch(data, target))
            return self._entries(data, lambda name: values or _ANY, path)
        struct = choose_struct(target, data)
        if struct is None or data.get(struct.tag_field or "", struct.tag) != struct.tag:
            return self._wrong_tag(data, target, path)
        fields = field_types(struct)
        for name in data:
            if name not in fields and is_text(name):
                self.errors.append(unknown_field(path, name, [struct]))
        known = {name: value for name, value in data.items() if name in fields or not is_text(name)}
        fitting = self._entries(known, fields.get, path)
        for field in struct.fields:
            if field.required and field.encode_name not in data:
                where = join(path, field.encode_name)
                self._wrong(where, f"required, and not given (expected {describe(field.type)})")
        return fitting

    def _entries(self, data: dict[str, Any], type_of: Callable[[str], Any], path: str) -> Any:
        fitting = {}
        for name, value in data.items():
            if not is_text(name):
                self._wrong(path, f"the name {shown(name)} is not UTF-8 text")
                continue
            found = self.value(value, type_of(name), join(path, name))
            if found is not _WRONG:
                fitting[name] = found
        return fitting

    def _wrong_tag(self, data: dict[str, Any], target: Any, path: str) -> Any:
        tag_field = struct_types(target)[0].tag_field or ""
        where = join(path, tag_field)
        if tag_field not in data:
            return self._wrong(where, f"required, and not given; one of {listing(tags(target))}")
        return self._wrong(where, _not_one_of(data[tag_field], tags(target)))

    def _wrong(self, path: str, problem: str) -> Any:
        self.errors.append(ConfigError(problem, key=path))
        return _WRONG


def _takes_any(target: Any) -> bool:
    return any(isinstance(option, inspect.AnyType) for option in alternatives(target))


def _problem(data: Any, target: Any) -> str | None:
    """What is wrong with a single value."""
    if isinstance(data, str) and not is_text(data):
        hint = "; a file of such a name is read when its folder is given"
        return f"{shown(data)} is not UTF-8 text{hint if note_of(target, NOTE) else ''}"
    if not any(_fits(data, option) for option in alternatives(target)):
        return _mismatch(data, target)
    if isinstance(data, float) and not math.isfinite(data):
        return f"must be a finite number, not {data}"
    if isinstance(data, int):
        unsigned = note_of(target, UNSIGNED)
        if data not in (_UINT64 if unsigned else _INT64):
            span = "lie between 0 and 2^64 - 1" if unsigned else "fit in 64 bits"
            return f"must {span}, not {shown(data)}"
    kind = note_of(target, NOTE)
    if kind is not None and isinstance(data, str):
        return path_problem(data, kind)
    return None


def _mismatch(data: Any, target: Any) -> str:
    literals = [t for t in alternatives(target) if isinstance(t, inspect.LiteralType)]
    if literals and isinstance(data, str):
        return _not_one_of(data, [v for t in literals for v in t.values])
    given = "null" if data is None else str(data).lower() if isinstance(data, bool) else shown(data)
    hint = ""
    if isinstance(data, str) and describe(target) == "a list" and len(data) < 100:
        hint = f"; write [{data}]"
    elif isinstance(data, str) and data in tags(target):
        hint = f"; write {{{struct_types(target)[0].tag_field}: {data}}}"
    return f"expected {describe(target)}, not {given}{hint}"


def _not_one_of(value: Any, known: Any) -> str:
    near = nearest(str(value), [str(v) for v in known])
    hint = f"; did you mean {near!r}?" if near else ""
    return f"{shown(value)} is not one of {listing(known)}{hint}"


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
