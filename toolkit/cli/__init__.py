"""The command line. Importing it takes a while; Ctrl-C meanwhile is one line, not a traceback."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def _leave(number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"SIGINT: stopped before anything began\n")
    os._exit(128 + number)


def stop_leaving() -> None:
    """Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if threading.current_thread() is threading.main_thread() and Path(sys.argv[0]).name in (
    "toolkit",
    "__main__.py",
):
    signal.signal(signal.SIGINT, _leave)
