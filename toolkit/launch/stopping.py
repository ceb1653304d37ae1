"""Stopping on request: signals, a file, the time limit, a launcher that died; and the agreement of
all ranks.

A signal, which `toolkit.signals` hears, only raises a flag; the loop ends the step in flight,
commits a checkpoint and leaves. A second one ends the process at once, which harms no committed
checkpoint.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from toolkit import parents, signals
from toolkit.config.base import in_seconds
from toolkit.runs.status import FAILURE, FINISH, STOP_FILE, WALL_TIME
from toolkit.signals import LAUNCHER_GONE

_REASONS = (
    *(
        "",
        FINISH,
        "a request",
        "SIGHUP",
        "SIGUSR1",
        "SIGUSR2",
        WALL_TIME,
        STOP_FILE,
        "SIGINT",
        "SIGTERM",
    ),
    *(LAUNCHER_GONE, FAILURE),
)
"""What ranks tell each other, by index; the greatest wins."""

_LEAST_MARGIN_SECONDS = 60.0
_STOP_FILE_SECONDS = 1.0


class WallTime:
    """A limit, in seconds or text such as `11h30m`, on the time since this attempt was `started`
    (Unix seconds; default: asked from the system). It is up `margin` before; None: twice the
    longest time seen between two polls, at least 60 s."""

    def __init__(
        self,
        limit: float | str,
        margin: float | str | None = None,
        *,
        started: float | None = None,
    ) -> None:
        self._margin = None if margin is None else in_seconds(margin)
        self._longest = 0.0
        self._last: float | None = None
        self._polls = 0
        since = time.time() - (attempt_started() if started is None else started)
        self._deadline = time.monotonic() + in_seconds(limit) - since

    def is_up(self) -> bool:
        """Whether to stop now; called once a step."""
        now = time.monotonic()
        self._polls += 1
        if self._last is not None and self._polls > 2:  # what the first step compiles stays
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now > self._deadline - self.margin

    def allow_for(self, seconds: float) -> None:
        """Something that the end will need took this long: a save in the background."""
        self._longest = max(self._longest, seconds)

    @property
    def margin(self) -> float:
        """Seconds kept free for the step in flight and the last save."""
        if self._margin is not None:
            return self._margin
        return max(_LEAST_MARGIN_SECONDS, 2 * self._longest)


def attempt_started() -> float:
    """When this attempt began, in Unix seconds: the start of the launcher, which outlives workers
    that it starts again, else of this process."""
    process = psutil.Process()
    started = process.create_time()
    if parents.HAS_LAUNCHER:
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            started = min(started, parent.create_time()) if parent else started
    return started


class StopRequest(signals.Receiver):
    """Why this rank wants to stop, if it does (any thread may ask), and what all ranks agreed.
    `stop_file`, a file that asks to stop, is for one rank only."""

    def __init__(self, *, wall_time: WallTime | None = None, stop_file: Path | None = None) -> None:
        self.reason: str | None = None
        """What this rank wants, or, once agreed, why all ranks stop."""
        self.speak_last: Callable[[str], str] | None = None
        """See `last_words`."""
        self.is_agreed = False
        """Whether all ranks stop; it becomes true on all of them at the same poll."""
        self.is_complete = False
        """Whether all ranks take the run as complete (`FINISH`); likewise. It is no stop: what
        comes after the last step is done, and a stop is still heard."""
        self._finishes = False
        """Whether this rank asked for that."""
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        """The agreement under way."""
        self._wall_time = wall_time
        self._stop_file = stop_file
        self._looked_at = -_STOP_FILE_SECONDS

    def ask(self, reason: str) -> None:
        """Stop at the end of the step in flight; the first reason stays, but for a failure.
        `FINISH`: see `is_complete`."""
        if reason == FINISH:
            self._finishes = True
        elif self.reason is None or (reason == FAILURE and not self.is_agreed):
            self.reason = reason

    def allow_for(self, seconds: float) -> None:
        """A save took this long: the time limit must leave room for the last one. Any thread."""
        if self._wall_time is not None:
            self._wall_time.allow_for(seconds)

    def done(self) -> None:
        """What was asked for has been done: the stop file goes, a later start must not see it."""
        if self._stop_file is not None:
            with contextlib.suppress(OSError):
                self._stop_file.unlink()

    def acknowledge(self, reason: str) -> str:
        return f"{reason}: stopping after this step{signals.again(reason)}"

    def last_words(self, reason: str) -> str | None:
        return self.speak_last(reason) if self.speak_last is not None else None

    def poll(self, group: dist.ProcessGroup | None) -> bool:
        """Whether all ranks stop now. Every rank of `group` (None: one process) calls it equally
        often. Nobody waits: what they want goes round while they compute, and the answer is that of
        the poll before."""
        if self.is_agreed:
            return True
        self._look()
        if group is None:
            self._agree(self._code())
            return self.is_agreed
        if self._vote is not None:
            vote, work = self._vote
            work.wait()
            self._vote = None
            self._agree(int(vote.item()))
        if not self.is_agreed:
            vote = torch.tensor(self._code())
            work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group, async_op=True)
            assert work is not None, "this rank belongs to the group"
            self._vote = vote, work
        return self.is_agreed

    def _agree(self, greatest: int) -> None:
        if greatest == _REASONS.index(FINISH):
            self.is_complete = True
        elif greatest:
            self.is_agreed = True
            if greatest != self._code():
                self.reason = _REASONS[greatest]

    def _look(self) -> None:
        """Reasons that nobody brings: they must be looked for."""
        if self._wall_time is not None and self._wall_time.is_up():
            self.ask(WALL_TIME)
        if self.reason is not None:
            return
        if parents.launcher_is_gone():
            self.ask(LAUNCHER_GONE)
        elif self._stop_file is not None:
            now = time.monotonic()
            if now - self._looked_at >= _STOP_FILE_SECONDS:
                self._looked_at = now
                if self._stop_file.exists():
                    self.ask(STOP_FILE)

    def _code(self) -> int:
        if self.reason is None:
            return _REASONS.index(FINISH if self._finishes and not self.is_complete else "")
        return _REASONS.index(self.reason if self.reason in _REASONS else "a request")


def stop_request_of(
    run_folder: Path,
    *,
    is_main: bool,
    max_wall_time: float | str | None = None,
    margin: float | str | None = None,
    stop_file: str | None = None,
) -> StopRequest:
    """One that knows the time limit and, on the main rank, the stop file."""
    return StopRequest(
        wall_time=None if max_wall_time is None else WallTime(max_wall_time, margin),
        stop_file=run_folder / stop_file if stop_file and is_main else None,
    )
