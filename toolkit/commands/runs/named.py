"""Runs by name."""

from pathlib import Path

from toolkit.errors import ConfigError
from toolkit.launch.remote_run import local_copy, run_and_step
from toolkit.runs.listing import find_named, find_run
from toolkit.storage.remote import is_url


def folder_of(text: str, work_dir: str | None = None, *, checkpoints: bool = True) -> Path:
    """The folder of the run that `toolkit runs` lists under this name; a copy of the run, or step,
    at a URL (see `local_copy`); anything else as it is."""
    if is_url(text):
        return local_copy(text, work_dir, checkpoints=checkpoints)
    return Path(find_named(text))


def url_of_run(text: str) -> str | None:
    """The run that a URL, of it or of one of its checkpoints, leads to; None for other words."""
    return run_and_step(text)[0] if is_url(text) else None


def run_to_read(text: str, root: str = "runs", registry_url: str | None = None) -> Path:
    """The folder of a run that is looked at: `text` is its name, id, folder or URL. Of a URL it is
    a copy without checkpoints. Raises RunError where there is none."""
    if is_url(text):
        return local_copy(text, checkpoints=False)
    return find_run(text, root=root, registry_url=registry_url)


def run_to_change(text: str, root: str = "runs", registry_url: str | None = None) -> Path:
    """The folder of a run that is changed, by name, id or folder. Raises ConfigError for a URL."""
    if is_url(text):
        raise ConfigError(
            f"{text}: a URL; only runs on this machine are changed. Change it where it was trained "
            "and bring it there with `toolkit runs push`"
        )
    return find_run(text, root=root, registry_url=registry_url)
