"""Dot-notation overrides: `--a.b.c=VALUE`, `--a.b.c VALUE`, and a bare `--a.b.c` for true.

VALUE is JSON or a YAML flow value, converted by the type of the field it is meant for. Scalars
follow the YAML 1.2 core schema, so `6e-3` is a number everywhere, `no` is text, and a text field
keeps its characters whatever they look like.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from msgspec import inspect

from toolkit.config.types import (
    allows_none,
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
# Longer texts are no number that a config can hold, and Python refuses to convert them.
_LONGEST_NUMBER = 400


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

    `sections` are the top-level names that may stand without a dot (`--seed=3`); `options` are the
    command's own long options, for the hint when one is misspelled; `root` is the type of the
    config, for the hint when a path is cut short.

    Raises:
        ConfigError: for the words that are not an override; with `found` they are kept there, and
            the others returned.
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
    """Convert `text` to plain JSON types for the type `target` (a `msgspec.inspect` node).

    Raises:
        ConfigError: when `text` is not a JSON or YAML flow value.
    """
    if _wants_text(target) and not text.startswith(('"', "'")):
        return None if text in ("null", "~") and allows_none(target) else text
    # The common scalars need no YAML parser, whose import costs more than all the rest.
    if _INT.match(text) or _FLOAT.match(text) or text in ("true", "false", "null"):
        return plain_scalar(text, target)
    from toolkit.config.flow import compose

    try:
        node = compose(text)
        return None if node is None else _convert(node, target)
    except ValueError as error:
        raise ConfigError(f"{shown(text)} is not a JSON or YAML value: {error}", key=path) from None


def _convert(node: Any, target: Any) -> Any:
    import yaml

    if isinstance(node, yaml.ScalarNode):
        if node.style in ("'", '"'):
            return node.value
        if _wants_text(target):
            is_null = node.value in ("null", "~", "") and allows_none(target)
            return None if is_null else node.value
        return plain_scalar(node.value, target)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(child, item_type(target, i)) for i, child in enumerate(node.value)]
    values = {k.value: v.value for k, v in node.value if isinstance(v, yaml.ScalarNode)}
    struct = choose_struct(target, values)
    fields = field_types(struct) if struct else {}
    other = value_type(target)
    return {k.value: _convert(v, fields.get(k.value, other)) for k, v in node.value}


def plain_scalar(text: str, target: Any = None) -> Any:
    """A plain (unquoted) scalar by the YAML 1.2 core schema; `1e6` is whole where `target` is."""
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if text in ("null", "Null", "NULL", "~", ""):
        return None
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        number = float(text)
        return int(number) if _wants_whole_number(target) and number.is_integer() else number
    return text


def _wants_whole_number(target: Any) -> bool:
    kinds = {type(option) for option in alternatives(target)}
    return inspect.IntType in kinds and inspect.FloatType not in kinds


def _wants_text(target: Any) -> bool:
    options = [t for t in alternatives(target) if not isinstance(t, inspect.NoneType)]
    return bool(options) and all(
        isinstance(t, inspect.StrType)
        or (isinstance(t, inspect.LiteralType) and all(isinstance(v, str) for v in t.values))
        for t in options
    )
