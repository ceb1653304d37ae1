"""Config files in JSON, with errors that point at the line and say what JSON takes."""

import json
import re
from pathlib import Path
from typing import Any

from toolkit.config.types import shown
from toolkit.errors import ConfigError
from toolkit.storage.foreign import nesting, read_bytes, reason_of

DEEPEST = 100
"""Mappings and lists inside each other; what nests deeper is no config."""
SCHEMA_KEY = "$schema"
"""Key by which an editor finds the JSON Schema of a file; it is no value of the config."""

_TO_JSON = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout, indent=2)"
_HINTS = {
    r"//|/\*|#": 'a comment, which JSON does not take; take it out ("description" takes a note)',
    r"'": 'text stands in double quotes, "like this"',
    r"True|False|None": "JSON writes true, false and null",
}
"""Start of what JSON does not take -> what to do."""


def read_json_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, without `$schema`. Raises ConfigError: the file cannot be read,
    is not UTF-8 JSON (with line and column), repeats a key, nests too deep, or holds something else
    than a mapping."""
    try:
        text = read_bytes(path, ConfigError).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: cannot be read: No such file or directory") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix.lower() == ".toml":
        raise ConfigError(f"{path}: TOML is not read; write the config as JSON")
    if path.suffix.lower() in (".yaml", ".yml"):
        target = path.with_suffix(".json").name
        raise ConfigError(
            f"{path}: YAML is not read; make JSON of it: python -c '{_TO_JSON}' < {path} > "
            f"{target}, then give {target}"
        )
    return parse_json_mapping(text, str(path))


def parse_json_mapping(text: str, name: str) -> dict[str, Any]:
    """The mapping in JSON `text`, without `$schema`; `name` stands for the file in messages."""
    try:
        check_nesting(text)
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{_explain(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid JSON: {reason_of(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping {{...}} of config sections at the top")
    return {key: value for key, value in data.items() if key != SCHEMA_KEY}


def check_nesting(text: str) -> None:
    """Raise ValueError where brackets stand too deep inside each other."""
    if nesting(text.encode("utf-8", "surrogatepass")) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")


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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {shown(key)} stands twice in one mapping")
        data[key] = value
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
