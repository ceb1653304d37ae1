"""Lock files: one process at a time, and the others wait or go on without."""

import contextlib
from collections.abc import Callable, Iterator

from toolkit.storage.atomic import PathLike

POLL_SECONDS = 0.25


@contextlib.contextmanager
def locked(
    path: PathLike, *, wait: bool = True, on_wait: Callable[[], object] = lambda: None
) -> Iterator[bool]:
    """Hold the lock file `path` during the block; yields whether it is held.

    With `wait=False` that is False while another process holds it. Otherwise `on_wait` is called
    once before waiting for it, and the answer is True. Errors are OSErrors.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            yield False
            return
        on_wait()
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        yield True
    finally:
        lock.release()
