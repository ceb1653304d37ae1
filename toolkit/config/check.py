"""Checks plain data against a config type before it is converted.

msgspec converts exactly and fast, but stops at the first mistake and says `Invalid enum value
'foo'` where a user needs the valid ones. This walk finds the same mistakes, all of them, and words
them: path, value, what was expected, and the nearest name.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from toolkit.config.base import UNSIGNED
from toolkit.config.overrides import parse_value
from toolkit.config.paths import NOTE, path_problem
from toolkit.config.references import filled_text, names_in
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
    tag_field,
    tag_names,
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
_KINDS: dict[type, Any] = {
    inspect.BoolType: bool,
    inspect.StrType: str,
    inspect.NoneType: type(None),
    inspect.IntType: int,
    inspect.FloatType: (int, float),
}
_WRONG: Any = object()
"""Stands for a value that does not fit."""


class Checked(NamedTuple):
    config: Any
    """The config, built without the values that do not fit; None where it needs one of them."""
    errors: list[ConfigError]


def convert(data: Any, config_type: type[T]) -> T:
    """`data` (plain JSON types) as a `config_type`. Raises ConfigError: naming the path, the value
    and what was expected; `SeveralErrors` of them where more than one is wrong."""
    checked = check(data, config_type)
    ErrorList(checked.errors).raise_any()
    return checked.config


def check(data: Any, config_type: type, environ: Mapping[str, str] | None = None) -> Checked:
    """Everything in `data` that does not fit `config_type`, and what can be made of the rest.

    With `environ`, a text where a field takes none may name its variables, as `${NAME}`: what they
    hold is read as the field's type.
    """
    walk, target = _Walk(environ), type_of(config_type)
    fitting = walk.value(expanded(data, target), target, "")
    built = None if fitting is _WRONG else msgspec.convert(fitting, config_type)
    return Checked(built, walk.errors + walk.refusals)


class _Walk:
    """Goes through data and its types side by side."""

    def __init__(self, environ: Mapping[str, str] | None) -> None:
        self._environ = environ
        self.errors: list[ConfigError] = []
        """Names and types that do not fit."""
        self.refusals: list[ConfigError] = []
        """What the `__post_init__` of structs refuses, inner ones first."""

    def value(self, data: Any, target: Any, path: str) -> Any:
        """`data` without what does not fit `target`, or is refused."""
        if isinstance(data, dict):
            return self._mapping(data, target, path)
        if self._environ is not None and isinstance(data, str) and names_in(data):
            return self._variable(data, target, path, self._environ)
        return self._plain(data, target, path)

    def _variable(self, text: str, target: Any, path: str, environ: Mapping[str, str]) -> Any:
        """What a text that names variables stands for, where a text itself does not fit. It is
        never shown: it may be a secret."""
        if any(isinstance(t, inspect.StrType | inspect.AnyType) for t in alternatives(target)):
            return self._plain(text, target, path)
        before = len(self.errors)
        try:
            filled = filled_text(text, environ, path)
        except ConfigError as error:
            return self._wrong(path, error.problem)
        with contextlib.suppress(ConfigError):
            found = self._plain(parse_value(filled, target, path), target, path)
            if found is not _WRONG:
                return found
        del self.errors[before:]
        return self._wrong(path, f"expected {describe(target)}, not what {text} stands for")

    def _plain(self, data: Any, target: Any, path: str) -> Any:
        if isinstance(data, list) and (item_type(target, 0) is not None or _takes_any(target)):
            for option in alternatives(target):
                if isinstance(option, inspect.TupleType) and len(data) != len(option.item_types):
                    expected = f"expected {describe(target)} values, not {shown(data)}"
                    return self._wrong(path, expected)
            items = [
                self.value(item, item_type(target, index) or _ANY, join(path, index))
                for index, item in enumerate(data)
            ]
            return _WRONG if any(item is _WRONG for item in items) else items
        problem = _problem(data, target)
        return data if problem is None else self._wrong(path, problem)

    def _struct(self, values: dict[str, Any], struct: inspect.StructType, path: str) -> Any:
        required = {field.encode_name for field in struct.fields if field.required}
        while required <= values.keys():
            try:
                msgspec.convert(values, struct.cls)
                return values
            except msgspec.ValidationError as error:
                # A struct's own line begins with the name of the field that it is about.
                refused = set()
                for line in str(error).partition(" - at `")[0].splitlines():
                    name = line.partition(" ")[0].partition(".")[0].rstrip(":")
                    about = join(path, name) if name in values else path
                    self.refusals.append(ConfigError(line.replace("`", ""), key=path, about=about))
                    refused.add(name)
            if not refused & values.keys():
                return _WRONG
            # The checks behind the one that failed are made without the value it is about.
            values = {name: value for name, value in values.items() if name not in refused}
        return _WRONG

    def _mapping(self, data: dict[str, Any], target: Any, path: str) -> Any:
        if not struct_types(target):
            values = value_type(target)
            if values is None and not _takes_any(target):
                return self._wrong(path, _mismatch(data, target))
            return self._entries(data, lambda name: values or _ANY, path)
        struct, tag = choose_struct(target, data), tag_field(target)
        if struct is None or data.get(tag, struct.tag) != struct.tag:
            names = tag_names(target)
            problem = f"required, and not given; one of {listing(names)}"
            if tag in data:
                problem = _not_one_of(data[tag], names)
            return self._wrong(join(path, tag), problem)
        fields = field_types(struct)
        unknown = {name for name in data if name not in fields and is_text(name)}
        self.errors += [unknown_field(path, name, [struct]) for name in data if name in unknown]
        known = {name: value for name, value in data.items() if name not in unknown}
        fitting = self._entries(known, fields.get, path)
        for field in struct.fields:
            if field.required and field.encode_name not in data:
                problem = f"required, and not given (expected {describe(field.type)})"
                self._wrong(join(path, field.encode_name), problem)
        return self._struct(fitting, struct, path)

    def _entries(self, data: dict[str, Any], type_of: Callable[[str], Any], path: str) -> Any:
        fitting = {}
        for name, value in data.items():
            if not is_text(name):
                self._wrong(path, f"the name {shown(name)} is not UTF-8 text")
            elif (found := self.value(value, type_of(name), join(path, name))) is not _WRONG:
                fitting[name] = found
        return fitting

    def _wrong(self, path: str, problem: str) -> Any:
        self.errors.append(ConfigError(problem, key=path))
        return _WRONG


def _takes_any(target: Any) -> bool:
    return any(isinstance(option, inspect.AnyType) for option in alternatives(target))


def _problem(data: Any, target: Any) -> str | None:
    """What is wrong with a single value."""
    kind = note_of(target, NOTE)
    if isinstance(data, str) and not is_text(data):
        hint = "; a file of such a name is read when its folder is given" if kind else ""
        return f"{shown(data)} is not UTF-8 text{hint}"
    if not any(_fits(data, option) for option in alternatives(target)):
        return _mismatch(data, target)
    if isinstance(data, float) and not math.isfinite(data):
        return f"must be a finite number, not {data}"
    unsigned = note_of(target, UNSIGNED)
    if isinstance(data, int) and data not in (_UINT64 if unsigned else _INT64):
        span = "lie between 0 and 2^64 - 1" if unsigned else "fit in 64 bits"
        return f"must {span}, not {shown(data)}"
    return path_problem(data, kind) if kind and isinstance(data, str) else None


def _mismatch(data: Any, target: Any) -> str:
    literals = [t for t in alternatives(target) if isinstance(t, inspect.LiteralType)]
    if literals and isinstance(data, str):
        switch = any(isinstance(t, inspect.BoolType) for t in alternatives(target))
        known = [v for t in literals for v in t.values]
        return _not_one_of(data, [*known, "true", "false"] if switch else known)
    given = "null" if data is None else str(data).lower() if isinstance(data, bool) else shown(data)
    hint = ""
    if isinstance(data, str) and describe(target) == "a list" and len(data) < 100:
        hint = f"; write [{data}]"
    elif isinstance(data, str) and data in tags(target):
        hint = f"; write {{{tag_field(target)}: {data}}}"
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
    kind = _KINDS.get(type(option), ())
    return isinstance(data, kind) and isinstance(data, bool) == (kind is bool)
