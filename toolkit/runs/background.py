"""Work beside a run: done in order, never in its way."""

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from toolkit.threads import Worker

log = logging.getLogger(__name__)


class Background:
    """Runs jobs that must neither delay nor fail a run, in order in a daemon thread: an error is a
    logged warning, and waiting has an end."""

    def __init__(self, name: str) -> None:
        self._worker = Worker(name)
        self._jobs: list[Future[None]] = []
        self._newest: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, job: Callable[[], None], *, key: str | None = None) -> None:
        """Have `job` run; a waiting one of the same `key` is dropped. Nothing runs after
        `close`."""

        def run() -> None:
            try:
                job()
            except Exception as error:
                log.warning("%s", error)

        with self._lock:
            if self._is_closed:
                return
            if key in self._newest:
                self._newest[key].cancel()
            future = self._worker.submit(run)
            self._jobs = [other for other in self._jobs if not other.done()] + [future]
            if key is not None:
                self._newest[key] = future

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all is done; False: it is not, after `seconds`."""
        return not concurrent.futures.wait(self._jobs, seconds).not_done

    def close(self, seconds: float) -> bool:
        """`wait`, drop what is left, and take no more jobs."""
        is_done = self.wait(seconds)
        with self._lock:
            self._is_closed = True
            for job in self._jobs:
                job.cancel()
        self._worker.stop()
        return is_done
