"""Threads that use the same GPU as the thread that starts them.

CUDA's current device belongs to a thread, and a new thread's is GPU 0: whatever it allocates, pins
or waits for there opens a context of half a gigabyte, for each process of the machine. So every
thread and pool of this package is one of these. torch is not imported for it.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


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


def same_device() -> Callable[[], None]:
    """What another thread calls to use the caller's CUDA device; does nothing where no GPU is used
    (asking an idle CUDA for its device would open a context)."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)
