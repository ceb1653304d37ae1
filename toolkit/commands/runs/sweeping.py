"""Folders of runs on their way out: hidden under a name of their own, then deleted."""

import contextlib
import re
import secrets
from pathlib import Path

from toolkit.errors import TrainingError
from toolkit.runs.lock import is_locked
from toolkit.storage.atomic import remove_tree

_REMOVED = re.compile(r"\.+.+\.[0-9a-f]{8}\.removed(\.\d+-[0-9a-f]{8}\.tmp)?\Z")


def doomed_name(folder: Path) -> Path:
    """What a run folder is called from the moment that it is no run any more."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.removed")


def sweep(experiment: Path) -> None:
    """Delete what removals that were cut short have left in a folder of runs."""
    with contextlib.suppress(OSError):
        for path in experiment.iterdir():
            if _REMOVED.match(path.name) and not is_locked(path):
                delete(path)


def delete(doomed: Path) -> None:
    """Delete a folder that is out of the way already; of a link, the link. Raises TrainingError."""
    try:
        if doomed.is_symlink():
            doomed.unlink()
        else:
            remove_tree(doomed)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or doomed}: cannot be deleted ({error.strerror}); the run is out of "
            f"the way as {doomed}, which `toolkit runs reindex` deletes later"
        ) from None
