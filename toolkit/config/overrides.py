"""Dot-notation overrides: `--a.b.c=VALUE`, `--a.b.c VALUE`, and a bare `--a.b.c` for true.

VALUE is JSON or a YAML flow value, converted by the type of the field it is meant for. Scalars
follow the YAML 1.2 core schema, so `6e-3` is a number everywhere, `no` is text, and a text field
keeps its characters whatever they look like.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from toolkit.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NON_FINITE = re.compile(r"([-+]?\.inf|\.nan)\Z", re.IGNORECASE)


class Override(NamedTuple):
    """One override as typed: the path, the text of its value, and the flag for messages."""

    path: str
    text: str
    flag: str


def parse_override_args(args: Sequence[str]) -> list[Override]:
    """Split the command line's extra arguments into overrides.

    Raises:
        ConfigError: for a word that is not an override (typo in a positional argument).
    """
    overrides, position = [], 0
    while position < len(args):
        arg = args[position]
        position += 1
        if not arg.startswith("--") or len(arg) == 2:
            raise ConfigError(
                f"{arg!r} is not an option; overrides look like --train_module.optim.lr=6e-3"
            )
        path, equals, text = arg[2:].partition("=")
        if not equals:
            following = args[position] if position < len(args) else None
            if following is not None and not following.startswith("--"):
                text, position = following, position + 1
            else:
                text = "true"
        if "." not in path and path != "seed":
            raise ConfigError(
                f"no such option: --{path} (config values are given by their full path, "
                "for example --trainer.hard_stop; `toolkit train --help` lists the short options)"
            )
        overrides.append(Override(path, text, f"--{path}={text}"))
    return overrides


def parse_value(text: str, target: Any, path: str) -> Any:
    """Convert `text` to plain JSON types for the msgspec type `target` (`msgspec.inspect` node).

    Raises:
        ConfigError: when `text` is not a JSON or YAML flow value.
    """
    if _wants_text(target) and text[:1] not in "\"'":
        return None if text in ("null", "~") and _allows(target, "none") else text
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"{path}: {text!r} is not a JSON or YAML value: {problem}") from None
    return None if node is None else _convert(node, target)


def _convert(node: Any, target: Any) -> Any:
    import yaml

    inspect = msgspec.inspect
    if isinstance(node, yaml.ScalarNode):
        if node.style in ("'", '"'):
            return node.value
        if _wants_text(target):
            is_null = node.value in ("null", "~", "") and _allows(target, "none")
            return None if is_null else node.value
        return plain_scalar(node.value)
    if isinstance(node, yaml.SequenceNode):
        item = next(
            (
                t.item_type
                for t in alternatives(target)
                if isinstance(t, inspect.ListType | inspect.VarTupleType)
            ),
            None,
        )
        tuple_items = next(
            (t.item_types for t in alternatives(target) if isinstance(t, inspect.TupleType)), ()
        )
        return [
            _convert(child, tuple_items[i] if i < len(tuple_items) else item)
            for i, child in enumerate(node.value)
        ]
    keys = [str(key.value) for key, _ in node.value]
    scalars = {str(k.value): v.value for k, v in node.value if isinstance(v, yaml.ScalarNode)}
    struct = choose_struct(target, scalars)
    values = next(
        (t.value_type for t in alternatives(target) if isinstance(t, inspect.DictType)), None
    )
    fields = {f.encode_name: f.type for f in struct.fields} if struct else {}
    return {
        name: _convert(child, fields.get(name, values))
        for name, (_, child) in zip(keys, node.value, strict=True)
    }


def plain_scalar(text: str) -> Any:
    """A plain (unquoted) scalar by the YAML 1.2 core schema."""
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if text in ("null", "Null", "NULL", "~", ""):
        return None
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    if _NON_FINITE.match(text):
        return float(text.replace(".", ""))
    return text


def alternatives(target: Any) -> tuple[Any, ...]:
    """The members of a union type node, or the node itself."""
    if isinstance(target, msgspec.inspect.UnionType):
        return target.types
    return () if target is None else (target,)


def choose_struct(target: Any, values: dict[str, Any]) -> Any:
    """The struct type among `target`'s alternatives that the tag in `values` selects, or None."""
    structs = [t for t in alternatives(target) if isinstance(t, msgspec.inspect.StructType)]
    if len(structs) <= 1:
        return structs[0] if structs else None
    return next((s for s in structs if values.get(s.tag_field) == s.tag), None)


def _allows(target: Any, kind: str) -> bool:
    inspect = msgspec.inspect
    kinds = {"none": inspect.NoneType, "text": inspect.StrType | inspect.LiteralType}
    return any(isinstance(t, kinds[kind]) for t in alternatives(target))


def _wants_text(target: Any) -> bool:
    inspect = msgspec.inspect
    options = [t for t in alternatives(target) if not isinstance(t, inspect.NoneType)]
    return bool(options) and all(
        isinstance(t, inspect.StrType)
        or (isinstance(t, inspect.LiteralType) and all(isinstance(v, str) for v in t.values))
        for t in options
    )
