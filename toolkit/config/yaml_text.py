"""YAML as configs take it.

Scalars follow the YAML 1.2 core schema, so `6e-3` is a number everywhere and `no` is text. Anchors,
aliases and tags are refused: a value can then be no larger than its text, and is a tree.
"""

import functools
import re
from typing import Any

from msgspec import inspect

from toolkit.config.types import (
    alternatives,
    choose_struct,
    field_types,
    item_type,
    shown,
    value_type,
)
from toolkit.storage.foreign import nesting

DEEPEST = 100
"""Mappings and lists inside each other; what nests deeper is no config."""

_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_CONSTANTS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", "")),
}
_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")
_LONGEST_NUMBER = 400
"""Longer texts are no number that a config can hold, and Python refuses to convert them."""


class YAMLProblem(ValueError):
    """What is wrong with a YAML text, and where: line and column from 1, where that is known."""

    def __init__(self, problem: str, mark: Any = None) -> None:
        super().__init__(problem)
        self.place = None if mark is None else (mark.line + 1, mark.column + 1)


def check_nesting(text: str) -> None:
    """Raise ValueError where brackets stand too deep inside each other."""
    if nesting(text.encode("utf-8", "surrogatepass")) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")


def load_yaml(text: str) -> Any:
    """The value of YAML `text` that may come from elsewhere. Raises ValueError: it is not YAML, or
    has anchors, aliases or tags."""
    return _read(text, as_node=False)


def load_config_yaml(text: str, target: Any = None) -> Any:
    """The value of YAML `text` for the type `target` (a `msgspec.inspect` node). Raises ValueError
    as `load_yaml` does."""
    node = _read(text, as_node=True)
    return None if node is None else _convert(node, target)


def dump_yaml(data: Any) -> str:
    """Plain JSON types as YAML that `load_config_yaml` reads as the same, without a type too."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        # Line ends other than \n are folded into spaces where they are not escaped.
        is_plain = isinstance(plain_scalar(value), str) and not _LINE_ENDS.search(value)
        style = None if is_plain else '"'
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def plain_scalar(text: str, target: Any = None) -> Any:
    """A plain (unquoted) scalar by the YAML 1.2 core schema; `1e6` is whole where `target` is."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        number = float(text)
        kinds = {type(option) for option in alternatives(target)}
        wants_whole = inspect.IntType in kinds and inspect.FloatType not in kinds
        return int(number) if wants_whole and number.is_integer() else number
    return text


def is_common_scalar(text: str) -> bool:
    """Whether it is a number, true, false or null: what needs no parser."""
    return bool(_INT.match(text) or _FLOAT.match(text)) or text in ("true", "false", "null")


def takes_null(target: Any) -> bool:
    return any(isinstance(t, inspect.NoneType | inspect.AnyType) for t in alternatives(target))


def wants_text(target: Any) -> bool:
    options = [t for t in alternatives(target) if not isinstance(t, inspect.NoneType)]
    return bool(options) and all(
        isinstance(t, inspect.StrType)
        or (isinstance(t, inspect.LiteralType) and all(isinstance(v, str) for v in t.values))
        for t in options
    )


def _read(text: str, *, as_node: bool) -> Any:
    import yaml

    check_nesting(text)
    try:
        return (yaml.compose if as_node else yaml.load)(text, Loader=_loader())
    except yaml.YAMLError as error:
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", "cannot be read"))
        if problem.startswith("but "):  # "found another document"
            problem = f"{getattr(error, 'context', None)}, {problem}"
        raise YAMLProblem(problem, getattr(error, "problem_mark", None)) from None
    except RecursionError:
        raise YAMLProblem(f"nested more than {DEEPEST} levels deep") from None


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            mark = event.start_mark
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                name = f"{'*' if isinstance(event, yaml.AliasEvent) else '&'}{event.anchor}"
                problem = f"anchors and aliases are not taken ({name}); write it out"
                raise YAMLProblem(problem, mark)
            if getattr(event, "tag", None) is not None:
                raise YAMLProblem(f"tags are not taken ({event.tag}); leave it out", mark)
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise YAMLProblem("a name in a mapping must be text", key.start_mark)
                if key.value in seen:
                    problem = f"the key {shown(key.value)} stands twice in one mapping"
                    raise YAMLProblem(problem, key.start_mark)
                seen.add(key.value)
            return node

    return Loader


def _convert(node: Any, target: Any) -> Any:
    if node.id == "scalar":
        if node.style:  # quoted, or a block
            return node.value
        if wants_text(target):
            is_none = node.value in ("null", "~", "") and takes_null(target)
            return None if is_none else node.value
        return plain_scalar(node.value, target)
    if node.id == "sequence":
        return [_convert(child, item_type(target, i)) for i, child in enumerate(node.value)]
    values = {k.value: v.value for k, v in node.value if v.id == "scalar"}
    fields, other = field_types(choose_struct(target, values)), value_type(target)
    return {k.value: _convert(v, fields.get(k.value, other)) for k, v in node.value}
