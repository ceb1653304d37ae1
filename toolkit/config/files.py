"""Reading JSON config files, with errors that point at the line."""

import json
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError
from toolkit.storage.foreign import read_bytes, reason_of


def read_json_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 JSON (with line and column), repeats a
            key, or holds something else than a mapping.
    """
    try:
        text = read_bytes(path, ConfigError).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: cannot be read: No such file or directory") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse_json_mapping(text, str(path))


def parse_json_mapping(text: str, name: str) -> dict[str, Any]:
    """The mapping in JSON `text`; `name` stands for the file in messages."""
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        problem = error.msg[:1].lower() + error.msg[1:]
        raise ConfigError(
            f"{name}:{error.lineno}:{error.colno}: not valid JSON: {problem}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid JSON: {reason_of(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: expected a mapping {{...}} of config sections at the top")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key!r} stands twice in one mapping")
        data[key] = value
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
