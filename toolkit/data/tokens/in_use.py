"""Which folders of a cache are in use, and when each was used last: one file beside each folder.

Who uses `<folder>` holds a shared `flock` on `.<name>.used`, and its time of change is the time of
the last use. The kernel drops the lock when the process ends, however it ends; a forked child
holds it too, until it ends as well.

Some network file systems know only the locks of their own machine (docs/data.md). Where a file
system refuses locks, everything counts as in use.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class UseMark:
    """Says that a folder is in use, until it is released or collected, or the process ends."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self.descriptor = descriptor

    def release(self) -> None:
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)
            # Not unlocked: a forked child that shares the lock may still be using the folder.
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            self.release()

    def __reduce__(self) -> "tuple[object, tuple[Path]]":
        return mark_used, (self.folder,)


def mark_used(folder: Path) -> UseMark | None:
    """Hold the mark of `folder`, which need not exist, and set its time.

    None where no mark can be made (folder not writable, no locks there); nothing removes a folder
    there either.
    """
    try:
        mark = UseMark(folder, _open(folder))
        fcntl.flock(mark.descriptor, fcntl.LOCK_SH)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # of another user
        os.utime(mark.descriptor)
    return mark


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Whether no process uses `folder`; none begins to while the block runs."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = _open(folder)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_unused = True
        except OSError:
            is_unused = False
        yield is_unused


def last_used(folder: Path) -> float:
    """Seconds since 1970 of the last use, as far as is known."""
    for path in (_mark_path(folder), folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def has_mark(folder: Path) -> bool:
    """Whether `folder` was ever marked as used."""
    return _mark_path(folder).exists()


def _mark_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.used")


def _open(folder: Path) -> int:
    path = _mark_path(folder)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # made by another user
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
