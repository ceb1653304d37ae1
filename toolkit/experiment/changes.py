"""What a resume changes in the config of its run: allowed, and shown."""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config import convert
from toolkit.config.types import join
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig

_UNSET = "unset"
_NOT_KEPT = ("run", "trainer.start_anew")
"""Names and folders of the run: it keeps them, however they are spelled. What is asked for once."""
_PLAIN = re.compile(r"(?!(true|false|null)\Z)[A-Za-z_][\w./-]*")


def config_changes(
    before: dict[str, Any], config: ExperimentConfig, started_in: str | None = None
) -> list[str]:
    """One line for each value that differs between the stored config `before`, whose paths are
    relative to `started_in`, and `config`."""
    new = msgspec.json.decode(msgspec.json.encode(config))  # lists, as stored
    # What a later release has added is no change.
    with contextlib.suppress(ConfigError):
        before = msgspec.json.decode(msgspec.json.encode(convert(before, ExperimentConfig)))
    return _changes(before, new, "", Path(started_in) if started_in else Path.cwd())


def _changes(old: Any, new: Any, path: str, folder: Path) -> list[str]:
    if old == new or path in _NOT_KEPT:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(k, old.get(k, _UNSET), new.get(k, _UNSET)) for k in {**old, **new}]
    elif _has_mappings(old) and _has_mappings(new) and len(old) == len(new):
        pairs = [(str(n), a, b) for n, (a, b) in enumerate(zip(old, new, strict=True))]
    elif is_same_place(old, new, folder, Path.cwd()):
        return []
    else:
        return [f"{path}: {_show(old)} -> {_show(new)}"]
    return [line for name, a, b in pairs for line in _changes(a, b, join(path, name), folder)]


def _has_mappings(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def is_same_place(old: Any, new: Any, old_folder: Path, new_folder: Path) -> bool:
    """Whether these are the same paths, or lists of them, relative to these folders, though some
    are written as absolute ones."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(
            is_same_place(a, b, old_folder, new_folder) for a, b in zip(old, new, strict=True)
        )
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    places = (old_folder, old), (new_folder, new)
    one, other = (os.path.abspath(folder / os.path.expanduser(path)) for folder, path in places)
    return old == new or one == other


def _show(value: Any) -> str:
    if value is _UNSET:
        return _UNSET
    return _flow(value) if isinstance(value, dict) else msgspec.json.encode(value).decode()


def _flow(value: Any) -> str:
    """A mapping as flags take it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return msgspec.json.encode(value).decode()
