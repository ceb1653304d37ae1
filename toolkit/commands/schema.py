"""What a part of a config may hold, in words: for readers; `config/schema.py` is for editors."""

import contextlib
import inspect
import json
import re
from typing import Any, NamedTuple

from toolkit.config.schema import field_docs
from toolkit.config.types import (
    CLASS,
    MODULE,
    child_type,
    describe,
    field_default,
    item_type,
    path_hint,
    paths_to,
    struct_types,
    tag_names,
    type_of,
    value_type,
)
from toolkit.data.config import TOKENIZER_PRESETS
from toolkit.errors import ConfigError
from toolkit.experiment.aliases import our_path
from toolkit.experiment.config import ExperimentConfig

_LONGEST_DEFAULT = 60
_BY_NAME = {
    "model": '{"preset": NAME} stands for a named size; `toolkit models` lists them.',
    "dataset.tokenizer": f"A name stands for one too: {', '.join(TOKENIZER_PRESETS)}.",
}
"""Path -> what may stand there in the place of its fields."""


class Field(NamedTuple):
    name: str
    type: str
    """What a user writes for it, in words."""
    default: str | None
    """As JSON; None where it must be given; empty of an item of a list or mapping."""
    doc: str


class Section(NamedTuple):
    """One struct of a config, or one field by itself."""

    title: str
    doc: str
    fields: list[Field]


def describe_path(path: str, type: str | None = None) -> list[Section]:
    """What may stand at the dotted `path`: a section for each struct it may be, or one for a single
    value, or for the struct of one `type`, which may also be the last name of the path. A path may
    be cut short where only one ends like it. Raises ConfigError: nothing is there, or it has no
    such type; names what looks like it."""
    path = our_path(path)
    try:
        path = _full(path)
    except ConfigError:
        above, _, last = path.rpartition(".")
        with contextlib.suppress(ConfigError):
            if above and type is None and last in _tags(_at(_full(above))[1]):
                return describe_path(above, last)
        raise
    owner, target = _at(path)
    structs = _structs(target)
    if type is not None:
        return [_of_type(path, target, type)]
    if not structs:
        return [Section(path, "", _variants(owner, target, path.rpartition(".")[2]))]
    title = f"{path}, each" if _is_many(target) else path
    described = [[_field(struct, name) for name in _names(struct)] for struct in structs]
    shared = _shared(described)
    doc = _BY_NAME.get(path, "")
    found = [Section(f"{title} of any type", doc, shared)] if shared else []
    for struct, tag, fields in zip(structs, _tags(target), described, strict=True):
        own = [field for field in fields if field not in shared]
        text = _doc(struct) if found else f"{_doc(struct)} {doc}".strip()
        found.append(Section(f"{title}{f' with type: {tag}' if tag else ''}", text, own))
    return found


def _at(path: str) -> tuple[Any, Any]:
    """The types of what holds the value of a full path, and of the value."""
    owner, target, above = None, type_of(ExperimentConfig), ""
    for name in path.split("."):
        owner, target = target, child_type(target, name, above, {})
        above = f"{above}.{name}".lstrip(".")
    return owner, target


def _of_type(path: str, target: Any, type: str) -> Section:
    structs, tags = _structs(target), _tags(target)
    if type not in tags or not type:
        known = f"one of {', '.join(sorted(tags))}" if len(tags) > 1 else "it has no types"
        raise ConfigError(f"no type {type!r}; {known}", key=path)
    struct = structs[tags.index(type)]
    fields = [_field(struct, name) for name in _names(struct)]
    return Section(f"{path} with type: {type}", _doc(struct), fields)


def _variants(owner: Any, target: Any, name: str) -> list[Field]:
    """A single value: once, or as each of the types has it that hold it."""
    found: dict[Field, list[str]] = {}
    for struct in struct_types(owner):
        if name in _names(struct):
            found.setdefault(_field(struct, name), []).append(_tag(struct))
    if len(found) < 2:
        return list(found) or [Field(name, _words(target), "", "")]
    return [f._replace(name=f"{name} of {', '.join(types)}") for f, types in found.items()]


def _shared(described: list[list[Field]]) -> list[Field]:
    """What every one of several structs has, with the same default."""
    if len(described) < 2:
        return []
    return [field for field in described[0] if all(field in fields for fields in described[1:])]


def _doc(struct: Any) -> str:
    return " ".join(inspect.cleandoc(struct.cls.__doc__ or "").split())


def _full(path: str) -> str:
    """The full path that `path` is the end of, where there is one alone."""
    root = type_of(ExperimentConfig)
    try:
        above, target = "", root
        for name in path.split("."):
            target = child_type(target, name, above, {})
            above = f"{above}.{name}".lstrip(".")
    except ConfigError as error:
        ends = [p for p in paths_to(root, path, most=None) if f".{p}".endswith(f".{path}")]
        if len(ends) == 1:
            return ends[0]
        if ends or "did you mean" not in error.problem:
            raise ConfigError(f"{path}: no such field; {path_hint(root, path)}") from None
        raise
    return path


def _is_many(target: Any) -> bool:
    return not struct_types(target) and bool(_structs(target))


def _structs(target: Any) -> list[Any]:
    """The structs at `target`, or else of its items or values."""
    for inner in (target, item_type(target, 0), value_type(target)):
        if inner is not None and (found := struct_types(inner)):
            return found
    return []


def _tags(target: Any) -> list[str]:
    """The tag of each of `_structs` as a user writes it; empty where there is but one."""
    structs = _structs(target)
    if len(structs) == 1:
        return [""]
    return [_tag(struct) for struct in structs]


def _tag(struct: Any) -> str:
    return "module:Class" if struct.tag in (CLASS, MODULE) else str(struct.tag)


def _names(struct: Any) -> list[str]:
    return [field.encode_name for field in struct.fields]


def _field(struct: Any, name: str) -> Field:
    field = next(field for field in struct.fields if field.encode_name == name)
    default = None
    if not field.required:
        text = json.dumps(field_default(struct, name, {}), ensure_ascii=False)
        brackets = {"{": "{...}", "[": "[...]"}
        default = (
            text if len(text) <= _LONGEST_DEFAULT else brackets.get(text[0], f"{text[:56]}...")
        )
    doc = field_docs(struct.cls).get(name, "")
    if not doc and len(inner := struct_types(field.type)) == 1:
        doc = re.split(r"(?<=\.)\s", _doc(inner[0]), maxsplit=1)[0]
    return Field(name, _words(field.type), default, doc)


def _words(target: Any) -> str:
    structs = struct_types(target)
    if len(structs) > 1:
        return f"a section whose type is one of {', '.join(tag_names(target))}"
    if structs:
        return "a section"
    text = describe(target)
    for word, inner in (("a list", item_type(target, 0)), ("a mapping", value_type(target))):
        if inner is not None and word in text:
            items = "sections" if struct_types(inner) else f"items: {_words(inner)}"
            text = text.replace(word, f"{word} of {items}", 1)
    return text
