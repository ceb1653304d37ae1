"""Dot-notation overrides: `--a.b.c=VALUE`, `--a.b.c VALUE`, and a bare `--a.b.c` for true.

VALUE is JSON or a YAML flow value, converted by the type of the field it is meant for. Scalars
follow the YAML 1.2 core schema, so `6e-3` is a number everywhere, `no` is text, and a text field
keeps its characters whatever they look like. Of YAML, anchors, aliases and tags are refused: a
value can then be no larger than its text, and is a tree.
"""

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from msgspec import inspect

from toolkit.config.files import DEEPEST, check_nesting
from toolkit.config.types import (
    alternatives,
    choose_struct,
    field_types,
    item_type,
    nearest,
    paths_to,
    shown,
    value_type,
)
from toolkit.errors import ConfigError, ErrorList
from toolkit.wording import shortened

_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_CONSTANTS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", "")),
}
_LONGEST_NUMBER = 400
"""Longer texts are no number that a config can hold, and Python refuses to convert them."""


class Override(NamedTuple):
    """One override as typed: the path, the text of its value, and the flag for messages."""

    path: str
    text: str
    flag: str


def parse_override_args(
    args: Sequence[str],
    *,
    sections: Collection[str] = (),
    options: Collection[str] = (),
    root: Any = None,
    found: ErrorList | None = None,
) -> list[Override]:
    """Split the command line's extra arguments into overrides.

    Args:
        sections: the top-level names that may stand without a dot (`--seed=3`).
        options: the command's own long options, for the hint when one is misspelled.
        root: the type of the config, for the hint when a path is cut short.
        found: keeps what is wrong, and the rest is returned; without it that raises ConfigError.
    """
    overrides, position = [], 0
    wrong = ErrorList() if found is None else found
    while position < len(args):
        arg = args[position]
        position += 1
        if not is_override(arg):
            wrong.add(ConfigError(_not_an_override(arg)))
            continue
        path, equals, text = arg[2:].partition("=")
        if not equals:
            text = "true"
            if position < len(args) and not is_override(args[position]):
                text, position = args[position], position + 1
        if "." not in path and path not in sections:
            wrong.add(ConfigError(_unknown_option(path, sections, options, root)))
            continue
        overrides.append(Override(path, text, f"--{path}={text}"))
    if found is None:
        wrong.raise_any()
    return overrides


def is_override(word: str) -> bool:
    """Whether a command-line word starts an override (and so is no value: `-5` is one)."""
    return word.startswith("--") and len(word) > 2


def _not_an_override(arg: str) -> str:
    if arg.startswith("-") and len(arg) > 1:
        return f"no such option: {shortened(arg)}; see --help, and --a.b.c=VALUE for config values"
    path, equals, _ = arg.partition("=")
    if equals and path.replace(".", "").replace("_", "").isalnum():
        return f"unexpected argument {shown(arg)}; type two dashes before it: --{shortened(arg)}"
    return f"unexpected argument {shown(arg)}; overrides look like --train_module.optim.lr=6e-3"


def _unknown_option(
    name: str, sections: Collection[str], options: Collection[str], root: Any
) -> str:
    name = shortened(name)
    if name in options:
        return (
            f"--{name} is no option of this command; give the value by its full path, as in "
            "--dataset.root=DIR"
        )
    known = paths_to(root, name) if root is not None else []
    near = known or [n for n in [nearest(name, [*sections, *options])] if n]
    hint = f"did you mean {' or '.join(f'--{n}' for n in near)}?" if near else "see --help"
    return (
        f"no such option: --{name}; {hint} "
        "(config values go by their full path, as in --trainer.hard_stop.value=20)"
    )


def parse_value(text: str, target: Any, path: str) -> Any:
    """Convert `text` to plain JSON types for the type `target` (a `msgspec.inspect` node). Raises
    ConfigError when `text` is not a JSON or YAML flow value."""
    if _wants_text(target) and not text.startswith(('"', "'")):
        return None if text in ("null", "~") and _takes_null(target) else text
    # The common scalars need no YAML parser, whose import costs more than all the rest.
    if _INT.match(text) or _FLOAT.match(text) or text in ("true", "false", "null"):
        return plain_scalar(text, target)
    try:
        node = _read_yaml(text, as_node=True)
        return None if node is None else _convert(node, target)
    except ValueError as error:
        problem = f"{shown(text)} is not a JSON or YAML value: {error}"
        raise ConfigError(problem, key=path) from None


def load_yaml(text: str) -> Any:
    """The value of YAML `text` that may come from elsewhere. Raises ValueError: it is not YAML, or
    has anchors, aliases or tags."""
    return _read_yaml(text, as_node=False)


def _read_yaml(text: str, *, as_node: bool) -> Any:
    import yaml

    check_nesting(text)
    try:
        return (yaml.compose if as_node else yaml.load)(text, Loader=_yaml_loader())
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", "cannot be read")
        raise ValueError(problem) from None
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                name = f"{'*' if isinstance(event, yaml.AliasEvent) else '&'}{event.anchor}"
                raise ValueError(f"anchors and aliases are not taken ({name}); write it out")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"tags are not taken ({event.tag}); leave it out")
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError("a name in a mapping must be text")
                if key.value in seen:
                    raise ValueError(f"the key {shown(key.value)} stands twice in one mapping")
                seen.add(key.value)
            return node

    return Loader


def _convert(node: Any, target: Any) -> Any:
    if node.id == "scalar":
        if node.style in ("'", '"'):
            return node.value
        if _wants_text(target):
            is_none = node.value in ("null", "~", "") and _takes_null(target)
            return None if is_none else node.value
        return plain_scalar(node.value, target)
    if node.id == "sequence":
        return [_convert(child, item_type(target, i)) for i, child in enumerate(node.value)]
    values = {k.value: v.value for k, v in node.value if v.id == "scalar"}
    fields, other = field_types(choose_struct(target, values)), value_type(target)
    return {k.value: _convert(v, fields.get(k.value, other)) for k, v in node.value}


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


def _takes_null(target: Any) -> bool:
    return any(isinstance(t, inspect.NoneType | inspect.AnyType) for t in alternatives(target))


def _wants_text(target: Any) -> bool:
    options = [t for t in alternatives(target) if not isinstance(t, inspect.NoneType)]
    return bool(options) and all(
        isinstance(t, inspect.StrType)
        or (isinstance(t, inspect.LiteralType) and all(isinstance(v, str) for v in t.values))
        for t in options
    )
