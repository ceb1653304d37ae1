"""Threads that use the same GPU as the thread that starts them, and cores for threads.

CUDA's current device belongs to a thread, and a new thread's is GPU 0: whatever it allocates, pins
or waits for there opens a context of half a gigabyte, for each process of the machine. So every
thread and pool of this package is one of these. torch is not imported for it.
"""

import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class Thread(threading.Thread):
    """A `threading.Thread` on the CUDA device of the thread that calls `start`."""

    _use_device: Callable[[], None]

    def start(self) -> None:
        self._use_device = same_device()
        super().start()

    def run(self) -> None:
        self._use_device()
        super().run()


class ThreadPool(ThreadPoolExecutor):
    """A `ThreadPoolExecutor` whose threads are on the CUDA device of the thread that makes it."""

    def __init__(self, max_workers: int | None = None, thread_name_prefix: str = "") -> None:
        super().__init__(max_workers, thread_name_prefix, initializer=same_device())


class Worker:
    """Runs jobs in order in one daemon thread, for which the end of the process does not wait."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)

    def submit(self, job: Callable[[], Result]) -> "Future[Result]":
        """Have `job` run. The thread starts with the first one."""
        if self._thread.ident is None:
            self._thread.start()
        future: Future[Result] = Future()
        self._jobs.put((future, job))
        return future

    def stop(self, timeout: float | None = 0.0) -> None:
        """End after the jobs so far; wait for that up to `timeout` seconds."""
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)


def same_device() -> Callable[[], None]:
    """What another thread calls to use the caller's CUDA device; does nothing where no GPU is used
    (asking an idle CUDA for its device would open a context)."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)


def cores_here() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
