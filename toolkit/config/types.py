"""Questions about config types, on the nodes of `msgspec.inspect`.

Overrides, layers and checks all walk plain data and the types it is meant for side by side; these
are the steps of that walk. A type of None is one that is not known.
"""

import difflib
import functools
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import inspect

from toolkit.config.named import is_name
from toolkit.errors import ConfigError

CLASS = "class"
"""Tag of the struct that holds a class of the user's, where a union has one; see `expanded`."""
MODULE = "module"
"""The same of a class that brings its own sizes: nothing but `options` is given beside its name."""
DOOR = "door"
"""Key under which the type of a field says that a struct takes further entries by any name,
`{"type": "module:Class", OPTION: VALUE, ...}`, which are kept in that field as
`{"target": "module:Class", "options": {...}}`; see `expanded`."""

_LONGEST_SHOWN = 120
_MOST_PATHS = 4
_WORDS: dict[type, str] = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.BoolType: "true or false",
    inspect.StrType: "text",
    inspect.NoneType: "null",
    inspect.ListType: "a list",
    inspect.VarTupleType: "a list",
    inspect.DictType: "a mapping",
}


class UnknownFieldError(ConfigError):
    """A name that does not exist, and does not look like one of those beside it."""


@functools.cache
def type_of(config_type: type) -> Any:
    """The node of a config type; the walk over all structs that it makes is made once."""
    return msgspec.inspect.type_info(config_type)


def join(path: str, name: str | int) -> str:
    """`path.name`, or just `name` at the root."""
    return f"{path}.{name}" if path else str(name)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, if any does."""
    # Comparing takes time in proportion to the length, and nobody mistypes a name of 100 letters.
    return next(iter(difflib.get_close_matches(name[:100], list(known), n=1)), None)


def alternatives(target: Any) -> tuple[Any, ...]:
    """The members of a union, or the node itself."""
    bare = (t.type if isinstance(t, inspect.Metadata) else t for t in _members(target))
    return tuple(t for t in bare if t is not None)


def note_of(target: Any, key: str) -> Any:
    """What `msgspec.Meta(extra={key: ...})` says of `target` or a member of it; else None."""
    notes = (t.extra or {} for t in _members(target) if isinstance(t, inspect.Metadata))
    return next((note[key] for note in notes if key in note), None)


def _members(target: Any) -> tuple[Any, ...]:
    return target.types if isinstance(target, inspect.UnionType) else (target,)


def struct_types(target: Any) -> list[inspect.StructType]:
    return [t for t in alternatives(target) if isinstance(t, inspect.StructType)]


def tag_field(target: Any) -> str:
    """The name under which a union of structs has its tag; empty for other types."""
    return next((s.tag_field for s in struct_types(target)), None) or ""


def tags(target: Any) -> tuple[Any, ...]:
    return tuple(s.tag for s in struct_types(target))


def tag_names(target: Any) -> list[str]:
    """The tags of a union as a user writes them: for a class of one's own, `module:Class`."""
    names = [tag for tag in tags(target) if tag not in (CLASS, MODULE)]
    return names + ["module:Class"] * (len(names) < len(tags(target)))


def choose_struct(target: Any, values: dict[str, Any]) -> inspect.StructType | None:
    """The struct that `values` are meant for: the only one, or the one its tag names."""
    structs = struct_types(target)
    if len(structs) <= 1:
        return structs[0] if structs else None
    return next((s for s in structs if values.get(s.tag_field or "") == s.tag), None)


def field_types(struct: inspect.StructType | None) -> dict[str, Any]:
    """`field -> type` of a struct, its tag included."""
    if struct is None:
        return {}
    fields: dict[str, Any] = {f.encode_name: f.type for f in struct.fields}
    if struct.tag_field:
        fields[struct.tag_field] = inspect.LiteralType((struct.tag,))
    return fields


def is_text(value: str) -> bool:
    """Whether every program can read it: Unicode without lone surrogates and null characters."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def is_index(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10


def item_type(target: Any, index: int) -> Any:
    """Type of item `index` of a list or tuple; None where `target` has no items."""
    for option in alternatives(target):
        if isinstance(option, inspect.ListType | inspect.VarTupleType):
            return option.item_type
        if isinstance(option, inspect.TupleType):
            return option.item_types[min(index, len(option.item_types) - 1)]
    return None


def value_type(target: Any) -> Any:
    mappings = (t for t in alternatives(target) if isinstance(t, inspect.DictType))
    return next((t.value_type for t in mappings), None)


def child_type(target: Any, name: str, path: str, values: dict[str, Any]) -> Any:
    """Type of the item `name` inside `target`, whose present value is `values`. Raises ConfigError:
    `target` has no such item; names the nearest one it has."""
    chosen = choose_struct(target, values)
    structs = [chosen] if chosen else struct_types(target)
    for struct in structs:
        if name == struct.tag_field:
            return inspect.LiteralType(tags(target))
        if name in field_types(struct):
            return field_types(struct)[name]
    if structs:
        raise unknown_field(path, name, structs)
    found = item_type(target, int(name)) if is_index(name) else None
    if found := found or value_type(target):
        return found
    if item_type(target, 0):
        raise ConfigError("a list; give the index of an item", key=path)
    raise no_field(path, name)


def no_field(path: str, name: str) -> ConfigError:
    return ConfigError(f"a single value; it has no field {shown(name)}", key=path)


def unknown_field(path: str, name: str, structs: Iterable[inspect.StructType]) -> ConfigError:
    """`path.name: no such field; did you mean ...?`"""
    names = sorted({f.encode_name for s in structs for f in s.fields})
    if near := nearest(name, names):
        return ConfigError(f"no such field; did you mean {near!r}?", key=join(path, name))
    known = ", ".join(names)
    if any(map(door_of, structs)):
        known += '; one of your own is {"type": "module:Class"}'
    return UnknownFieldError(f"no such field; known: {known}", key=join(path, name))


def names_class(target: Any) -> bool:
    """Whether a struct without a tag has a `target`, a class of the user's, which may be written
    `type` as in unions."""
    structs = struct_types(target)
    names = field_types(structs[0]).keys() if len(structs) == 1 else ()
    return "target" in names and "type" not in names


def door_of(target: Any) -> tuple[str, Any] | None:
    """The field of a struct that keeps entries of any name (see `DOOR`), and their type."""
    structs = struct_types(target)
    fields = structs[0].fields if len(structs) == 1 else ()
    found = (f for f in fields if note_of(f.type, DOOR))
    return next(((f.encode_name, value_type(f.type)) for f in found), None)


def doors(target: Any, path: str = "") -> dict[str, Any]:
    """Path -> type of every struct below `target` that has a door."""
    found = {path: target} if door_of(target) else {}
    for name, inner in field_types(choose_struct(target, {})).items():
        found |= doors(inner, join(path, name))
    return found


def through_door(value: dict[str, Any], entry: Any) -> dict[str, Any]:
    """What an entry `{"type": NAME, OPTION: VALUE, ...}` is kept as, a struct of type `entry`."""
    rest = {name: item for name, item in value.items() if name != "type"}
    kept = {name: rest.pop(name) for name in field_types(choose_struct(entry, {})) if name in rest}
    kept["target"] = value["type"]
    if rest:
        given = kept.get("options", {})
        kept["options"] = {**given, **rest} if isinstance(given, dict) else given
    return kept


def _through_doors(data: dict[str, Any], target: Any, path: str) -> dict[str, Any]:
    if (door := door_of(target)) is None or not isinstance(data.get(door[0], {}), dict):
        return data
    own, known = {}, field_types(choose_struct(target, data))
    for name, value in data.items():
        if name not in known and isinstance(value, dict) and "type" in value:
            if name in data.get(door[0], {}):
                raise ConfigError(f"given twice, here and in {door[0]}", key=join(path, name))
            own[name] = through_door(value, door[1])
    rest = {name: value for name, value in data.items() if name not in own}
    return {**rest, door[0]: {**rest.get(door[0], {}), **own}} if own else data


def expanded(data: Any, target: Any, path: str = "") -> Any:
    """`data` with `{"type": "class", "target": NAME}` for each `{"type": NAME}` whose NAME is
    "module:Class", where the union of types takes a class of the user's; and with what a user named
    himself where it is kept. Raises ConfigError: such a name is given twice."""
    if isinstance(data, list):
        return [
            expanded(item, item_type(target, index), join(path, index))
            for index, item in enumerate(data)
        ]
    if not isinstance(data, dict):
        return data
    data = _through_doors(data, target, path)
    tag = tag_field(target)
    if CLASS in tags(target) and is_name(data.get(tag)):
        is_alone = MODULE in tags(target) and data.keys() <= {tag, "options"}
        data = {**data, tag: MODULE if is_alone else CLASS, "target": data[tag]}
    elif "type" in data and names_class(target) and "target" not in data:
        data = {"target" if name == "type" else name: value for name, value in data.items()}
    fields = field_types(choose_struct(target, data))
    return {
        name: expanded(value, fields.get(name) or value_type(target), join(path, name))
        for name, value in data.items()
    }


def paths_to(target: Any, path: str, most: int | None = _MOST_PATHS) -> list[str]:
    """The full paths below `target` that end like `path`, or else in its last name: the shortest
    ones. Items of lists and mappings have none."""
    path = path.replace("-", "_")
    found = _paths_to(target, path.rpartition(".")[2], "", ())
    alike = [full for full in found if f".{full}".endswith(f".{path}")] or found
    return sorted(alike, key=lambda full: (full.count("."), full))[:most]


def path_hint(target: Any, path: str) -> str:
    """What to type in place of `path`, to which nothing below `target` leads."""
    near = paths_to(target, path)
    if not near:
        parent, _, last = path.replace("-", "_").rpartition(".")
        known: dict[str, list[str]] = {}
        for full in _paths_to(target, None, "", ()):
            above, _, name = full.rpartition(".")
            if not parent or f".{above}".endswith(f".{parent}"):
                known.setdefault(name, []).append(full)
        near = known.get(nearest(last, known) or "", [])[:_MOST_PATHS]
    return f"did you mean {' or '.join(near)}?" if near else "`toolkit schema` lists all"


def _paths_to(target: Any, name: str | None, path: str, above: tuple[type, ...]) -> list[str]:
    """The paths whose last name is `name`, or all."""
    found = []
    if path and (tag := tag_field(target)) and name in (tag, None):
        found.append(join(path, tag))
    for struct in struct_types(target):
        for field in struct.fields if struct.cls not in above else ():
            here = join(path, field.encode_name)
            if name in (field.encode_name, None):
                found.append(here)
            found += _paths_to(field.type, name, here, (*above, struct.cls))
    return list(dict.fromkeys(found))


def field_default(target: Any, name: str, values: dict[str, Any]) -> Any:
    """Fresh JSON types of the default of field `name`; None where there is none."""
    struct = choose_struct(target, values)
    for field in struct.fields if struct else ():
        if field.encode_name == name and not field.required:
            has_factory = field.default_factory is not msgspec.NODEFAULT
            default = field.default_factory() if has_factory else field.default
            return msgspec.json.decode(msgspec.json.encode(default))
    return None


def describe(target: Any) -> str:
    """What a user would write for `target`, in words."""
    words = [_describe_one(option) for option in alternatives(target)]
    words.sort(key=lambda word: word == "null")  # last
    return " or ".join(dict.fromkeys(words)) or "nothing"


def _describe_one(option: Any) -> str:
    if isinstance(option, inspect.LiteralType):
        return f"one of {listing(option.values)}"
    if isinstance(option, inspect.StructType):
        names = [f.encode_name for f in option.fields]
        return f"a mapping with {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    if isinstance(option, inspect.TupleType):
        return f"a list of {len(option.item_types)}"
    return _WORDS.get(type(option), "a value")


def shown(value: Any) -> str:
    """`value` as a message quotes it, shortened to what fits on a line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]}...{text[-1]}"


def listing(values: Iterable[Any]) -> str:
    return ", ".join(sorted(str(v) for v in values))
