"""Runs by name, and their list."""

from pathlib import Path

from toolkit.config.paths import local_path
from toolkit.errors import ConfigError
from toolkit.runs import registry
from toolkit.runs.registry import RunRecord, find_named


def folder_of(text: str) -> Path:
    """The folder of the run that `toolkit runs` lists under this name; anything else as it is."""
    return Path(find_named(text))


def list_all(root: str, registry_url: str | None) -> list[RunRecord]:
    _check_root(root)
    return registry.list_runs(root, registry_url=registry_url)


def reindex(root: str, registry_url: str | None) -> int:
    _check_root(root)
    return registry.reindex(root, registry_url=registry_url)


def _check_root(root: str) -> None:
    if root != "runs" and not local_path(root, "--root").is_dir():
        raise ConfigError(f"--root: {root}: no such folder")
