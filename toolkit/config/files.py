"""Config files in JSON or YAML, with errors that point at the line and say what it takes."""

import json
import re
from pathlib import Path
from typing import Any

from toolkit.config.types import shown
from toolkit.config.yaml_text import check_nesting, load_config_yaml
from toolkit.errors import ConfigError
from toolkit.storage.atomic import create_atomic, why_not_creatable
from toolkit.storage.foreign import read_bytes, reason_of

YAML_SUFFIXES = (".yaml", ".yml")
SCHEMA_KEY = "$schema"
"""Key by which an editor finds the JSON Schema of a file; it is no value of the config."""

_NO_TOML = (
    "TOML is not read; write the config as JSON or YAML (docs/migrate/torchtitan.md has the names "
    "of torchtitan's)"
)
_HINTS = {
    r"/\*": "a comment that does not end; it ends with */",
    r"#": "a comment begins with //, or stands in /* */",
    r"'": 'text stands in double quotes, "like this"',
    r"True|False|None": "JSON writes true, false and null",
}
"""Start of what JSON does not take -> what to do."""
_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
"""Comments, and texts, in which none begins."""


def read_json_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, without `$schema`. Raises ConfigError: the file cannot be
    read, is not UTF-8 JSON or YAML (with line and column), repeats a key, nests too deep, or holds
    something else than a mapping."""
    try:
        text = read_bytes(path, ConfigError).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: cannot be read: No such file or directory") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix.lower() == ".toml":
        raise ConfigError(f"{path}: {_NO_TOML}")
    if path.suffix.lower() in YAML_SUFFIXES:
        return _parse_yaml_mapping(text, str(path))
    return parse_json_mapping(text, str(path))


def check_new(path: Path) -> None:
    """Raise ConfigError where a config file cannot be made as `path`, or would not be read."""
    if path.suffix.lower() == ".toml":
        raise ConfigError(f"{path}: {_NO_TOML}")
    if (problem := why_not_creatable(path)) is not None:
        advice = "; give another file name" if problem == "exists" else ""
        raise ConfigError(f"{path}: {problem}{advice}")


def write_new(path: Path, text: str) -> None:
    """Write a config file, whole or not at all. Raises ConfigError: it exists, or cannot be
    written."""
    check_new(path)
    try:
        is_new = create_atomic(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    if not is_new:
        check_new(path)


def _parse_yaml_mapping(text: str, name: str) -> dict[str, Any]:
    try:
        data = load_config_yaml(text)
    except ValueError as error:
        place = getattr(error, "place", None)
        where = f"{name}:{place[0]}:{place[1]}" if place else name
        raise ConfigError(f"{where}: not valid YAML: {reason_of(error)}") from None
    return _config_in(data, name)


def parse_json_mapping(text: str, name: str) -> dict[str, Any]:
    """The mapping in JSON `text`, which may have comments, without `$schema`; `name` stands for the
    file in messages."""
    text = _COMMENT.sub(_blank, text)
    try:
        check_nesting(text)
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{_explain(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid JSON: {reason_of(error)}") from None
    return _config_in(data, name)


def _config_in(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping {{...}} of config sections at the top")
    return {key: value for key, value in data.items() if key != SCHEMA_KEY}


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """`LINE:COLUMN: not valid JSON: ...`, with what to write instead where that is known."""
    position, here = error.pos, text[error.pos :]
    before = text[:position].rstrip()
    problem = error.msg[:1].lower() + error.msg[1:]
    is_behind_comma = before.endswith(",") and here.startswith(("]", "}"))
    if is_behind_comma or re.match(r",\s*[\]}]", here):
        position = len(before) - 1 if is_behind_comma else position
        problem = "a comma before the closing bracket; take it out"
    elif hint := next((hint for start, hint in _HINTS.items() if re.match(start, here)), None):
        problem = hint
    elif not text.strip():
        problem = "the file is empty"
    elif not text.lstrip().startswith(("{", "[", '"')):
        problem += "; a config is a mapping {...} in JSON, `toolkit recipes` has examples"
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"{line}:{column}: not valid JSON: {problem}"


def _blank(match: re.Match[str]) -> str:
    """Spaces in the place of a comment, so that what follows keeps its line and column."""
    found = match[0]
    return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {shown(key)} stands twice in one mapping")
        data[key] = value
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
