"""The process that started this one, and what to do when it is gone. No torch: see `signals`."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.threads import Thread

PARENT = os.getppid()
"""Who started this process."""

_LAUNCHER_VARIABLES = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
_REFUSALS = 4
"""Refused connections to the launcher's store, a second apart, that mean it is dead."""


def launcher_is_gone() -> bool:
    """Whether a launcher started this process and has ended. A shell that exits after
    `toolkit train &` is nobody's business."""
    return os.getppid() != PARENT and any(name in os.environ for name in _LAUNCHER_VARIABLES)


def end_with_parent(parent: int) -> None:
    """End this process, a worker, once `parent` is gone: a killed process cannot end others."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    Thread(target=watch, name="parent-watch", daemon=True).start()


def orphan_check() -> Callable[[], bool]:
    """For a launcher that ended before this process could look who started it; called every tick.

    A worker of an elastic launcher finds nobody at the address of its launcher's store, which was
    there before it. `accelerate launch` of one process has no store: the process then belongs to
    the first of the machine, which is not called accelerate.
    """
    environ = os.environ
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        except (KeyError, ValueError):
            return lambda: False
        refused, next_look = 0, 0.0

        def store_is_gone() -> bool:
            nonlocal refused, next_look
            if time.monotonic() < next_look:
                return False
            next_look = time.monotonic() + 1.0
            try:
                socket.create_connection(address, 2.0).close()
                next_look = float("inf")
            except ConnectionRefusedError:
                refused += 1
            except OSError:
                next_look = float("inf")  # a network that cannot be judged
            return refused >= _REFUSALS

        return store_is_gone
    if "ACCELERATE_MIXED_PRECISION" in environ and PARENT == 1:
        with contextlib.suppress(OSError):
            is_launcher = b"accelerate" in Path("/proc/1/cmdline").read_bytes()
            return lambda: not is_launcher
    return lambda: False
