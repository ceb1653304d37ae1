"""Work that must neither delay nor fail a run: errors are warnings, and waiting for it has an
end."""

import logging
import threading
import time
from collections.abc import Callable

from toolkit.threads import Thread

log = logging.getLogger(__name__)


class Background:
    """Runs jobs in order in a daemon thread, which starts with the first one."""

    def __init__(self, *, name: str) -> None:
        self._name = name
        self._jobs: list[tuple[str | None, Callable[[], None]]] = []
        self._is_busy = False
        self._thread: Thread | None = None
        self._changed = threading.Condition()
        self._is_closed = False

    def submit(self, job: Callable[[], None], *, key: str | None = None) -> None:
        """Have `job` run; it takes the place of a waiting one with the same `key`. Dropped after
        `close`."""
        with self._changed:
            if self._is_closed:
                return
            self._jobs = [other for other in self._jobs if key is None or other[0] != key]
            self._jobs.append((key, job))
            if self._thread is None:
                self._thread = Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all is done; False: it is not, after `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while self._jobs or self._is_busy:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, seconds: float) -> bool:
        """`wait`, and take no more jobs."""
        is_done = self.wait(seconds)
        with self._changed:
            self._is_closed = True
            self._jobs = []
            self._changed.notify_all()
        return is_done

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._is_closed:
                        return
                    self._changed.wait()
                _, job = self._jobs.pop(0)
                self._is_busy = True
            try:
                job()
            except Exception as error:
                log.warning("%s", error)
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()
