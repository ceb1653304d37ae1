"""Stopping on request: signals, a launcher that died, and the agreement of all ranks.

The first SIGTERM or SIGINT only raises a flag; the loop ends the step in flight, commits a
checkpoint and leaves. Launchers repeat a terminal's signal, so a second one counts as "now" only
after two seconds; it then kills the process at once, which harms no committed checkpoint.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

REPEAT_SECONDS = 2.0


class StopRequest:
    """Why this rank wants to stop, if it does; any thread may ask."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = 0.0
        # Only under a launcher: a shell that exits after `toolkit train &` is nobody's business.
        launched = "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        self._launcher = os.getppid() if launched else None

    def ask(self, reason: str) -> None:
        """Stop at the end of the step in flight; the first reason stays."""
        if self.reason is None:
            self.reason = reason
            self._since = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT inside the block (in the main thread only)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, group: dist.ProcessGroup | None) -> bool:
        """Whether any rank wants to stop. A collective over `group` (None: one process)."""
        if self.reason is None and self._has_lost_launcher():
            self.ask("the launcher is gone")
        if group is None:
            return self.reason is not None
        flag = torch.tensor(int(self.reason is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
        if flag.item() and self.reason is None:
            self.ask("another rank was asked to stop")
        return bool(flag.item())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and time.monotonic() - self._since > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.ask(signal.Signals(number).name)

    def _has_lost_launcher(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher
