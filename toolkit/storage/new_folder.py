"""Folders that appear whole under their name, or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import CheckpointError, TrainingError
from toolkit.storage import atomic
from toolkit.storage.atomic import PathLike


def check_unused(folder: PathLike) -> None:
    """Raise CheckpointError when `folder` exists and is not an empty folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: already exists; remove it or choose another folder")


@contextlib.contextmanager
def new_folder(folder: PathLike) -> Iterator[Path]:
    """A temporary folder beside `folder`, whose name it gets, synced, when the block ends; after an
    error nothing is left.

    Raises:
        CheckpointError: `folder` is in use, or cannot be made.
        TrainingError: a file in it cannot be written (the disk is full).
    """
    folder = Path(folder)
    check_unused(folder)
    is_made = False
    try:
        # Of a link, what it points to.
        with atomic.new_folder(folder.resolve()) as unfinished:
            is_made = True
            yield unfinished
    except OSError as error:
        if not is_made:
            raise CheckpointError(f"{folder}: cannot be made: {error.strerror}") from None
        raise TrainingError(
            f"{folder}: cannot be written, nothing is left of it: {error.strerror or error}"
        ) from error
