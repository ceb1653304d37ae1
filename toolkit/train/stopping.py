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
from typing import NamedTuple

import torch
import torch.distributed as dist

from toolkit.distributed.launcher import has_launcher

REPEAT_SECONDS = 2.0

LAUNCHER_GONE = "the launcher is gone"
FAILURE = "failure"
_REASONS = ("", "a request", "SIGINT", "SIGTERM", LAUNCHER_GONE, FAILURE)
"""What ranks tell each other, by index; the greatest wins."""


class _Vote(NamedTuple):
    """One agreement under way."""

    code: torch.Tensor
    work: dist.Work


class StopRequest:
    """Why this rank wants to stop, if it does (any thread may ask), and what all ranks agreed."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What this rank wants, or, once agreed, why all ranks stop."""
        self.is_agreed = False
        """Whether all ranks stop; it becomes true on all of them at the same poll."""
        self._since = 0.0
        self._vote: _Vote | None = None
        # Only under a launcher: a shell that exits after `toolkit train &` is nobody's business.
        self._launcher = os.getppid() if has_launcher(os.environ) else None

    def ask(self, reason: str) -> None:
        """Stop at the end of the step in flight; the first reason stays, but for a failure."""
        if self.reason is None or (reason == FAILURE and not self.is_agreed):
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

    def poll(self, group: dist.ProcessGroup | None) -> bool:
        """Whether all ranks stop now.

        Every rank of `group` (None: one process) calls it equally often. Nobody waits: what ranks
        want goes round while they compute, and the answer is that of the poll before.
        """
        if self.is_agreed:
            return True
        if self.reason is None and self._has_lost_launcher():
            self.ask(LAUNCHER_GONE)
        if group is None:
            self.is_agreed = self.reason is not None
            return self.is_agreed
        if self._vote is not None:
            self._vote.work.wait()
            self._agree(int(self._vote.code.item()))
            self._vote = None
        if not self.is_agreed:
            code = torch.tensor(self._code())
            work = dist.all_reduce(code, op=dist.ReduceOp.MAX, group=group, async_op=True)
            assert work is not None, "this rank belongs to the group"
            self._vote = _Vote(code, work)
        return self.is_agreed

    def _agree(self, code: int) -> None:
        if code:
            self.is_agreed = True
            if code != self._code():
                self.reason = _REASONS[code]

    def _code(self) -> int:
        if self.reason is None:
            return 0
        return _REASONS.index(self.reason) if self.reason in _REASONS else 1

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and time.monotonic() - self._since > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.ask(signal.Signals(number).name)

    def _has_lost_launcher(self) -> bool:
        return self._launcher is not None and os.getppid() != self._launcher
