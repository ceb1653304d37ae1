"""Dot-notation overrides: `--a.b.c=VALUE`, `--a.b.c VALUE`, and a bare `--a.b.c` for true.

VALUE is JSON or a YAML flow value, converted by the type of the field it is meant for. Scalars
follow the YAML 1.2 core schema, so `6e-3` is a number everywhere, `no` is text, and a text field
keeps its characters whatever they look like. Of YAML, anchors, aliases and tags are refused: a
value can then be no larger than its text, and is a tree.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from toolkit.config.types import nearest, paths_to, shown
from toolkit.config.yaml_text import (
    is_common_scalar,
    load_config_yaml,
    plain_scalar,
    takes_null,
    wants_text,
)
from toolkit.errors import ConfigError, ErrorList
from toolkit.wording import shortened


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
    theirs: Mapping[str, str] = MappingProxyType({}),
    root: Any = None,
    found: ErrorList | None = None,
) -> list[Override]:
    """Split the command line's extra arguments into overrides.

    Args:
        sections: the top-level names that may stand without a dot (`--seed=3`).
        options: the command's own long options, for the hint when one is misspelled.
        theirs: names of other programs, and the paths that are meant, for that hint too.
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
            wrong.add(ConfigError(_unknown_option(path, sections, options, theirs, root)))
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
    name: str,
    sections: Collection[str],
    options: Collection[str],
    theirs: Mapping[str, str],
    root: Any,
) -> str:
    name = shortened(name)
    if name in options:
        return (
            f"--{name} is no option of this command; give the value by its full path, as in "
            "--dataset.root=DIR"
        )
    known = paths_to(root, name) if root is not None else []
    if (meant := theirs.get(name.replace("-", "_"))) is not None:
        known = [meant]
    near = known or [n for n in [nearest(name, [*sections, *options])] if n]
    hint = f"did you mean {' or '.join(f'--{n}' for n in near)}?" if near else "see --help"
    return (
        f"no such option: --{name}; {hint} "
        "(config values go by their full path, as in --trainer.hard_stop.value=20)"
    )


def parse_value(text: str, target: Any, path: str) -> Any:
    """Convert `text` to plain JSON types for the type `target` (a `msgspec.inspect` node). Raises
    ConfigError when `text` is not a JSON or YAML flow value."""
    if wants_text(target) and not text.startswith(('"', "'")):
        return None if text in ("null", "~") and takes_null(target) else text
    # The common scalars need no YAML parser, whose import costs more than all the rest.
    if is_common_scalar(text):
        return plain_scalar(text, target)
    try:
        return load_config_yaml(text, target)
    except ValueError as error:
        problem = f"{shown(text)} is not a JSON or YAML value: {error}"
        raise ConfigError(problem, key=path) from None
