"""Ends a job that makes no progress, and says which rank it waits for.

1. The loop beats a `Heartbeat` at the same points on every rank: a few attribute writes a step.
2. A thread of each rank watches its own. After half the timeout without a beat it publishes how far
   its rank is, in a file: collectives no longer work.
3. After the timeout it announces the hang; each rank that stands still writes the stacks of all its
   threads into its log file.
4. The lowest rank that still answers compares: the rank with the fewest beats is the one that the
   others wait for; one that publishes nothing is dead or frozen. It says so in one line, and all
   end with exit code 1, so that the launcher ends what is left.

Time in which the whole process was suspended does not count. A rank stuck in native code that holds
Python's lock cannot run the thread: its stacks are written by a timer outside Python.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from toolkit.errors import EXIT_FAILED
from toolkit.launch.failures import Peers, RankNote
from toolkit.runs.files import RUN_FILES
from toolkit.threads import Thread

SLOW_FACTOR = 3.0
"""How much longer the first step (it compiles) and callbacks (evaluating, saving) may take."""

ORPHAN_SECONDS = 60.0
"""A rank whose launcher is gone waits no longer than this for the others to stop with it."""


class Heartbeat:
    """Where the training thread is; written by it alone."""

    def __init__(self) -> None:
        self.step = 0
        self.phase = "starting"
        self.is_slow = True
        self.count = 0

    def beat(self, phase: str, step: int, *, is_slow: bool = False) -> None:
        """Begin `phase` of `step`; `is_slow` phases have `SLOW_FACTOR` times the time."""
        self.phase = phase
        self.step = step
        self.is_slow = is_slow
        self.count += 1


class Watchdog:
    """Watches the heartbeat of this rank between `start` and `stop`.

    `has_lost_launcher` says whether nobody is left to end this process; `on_hang` is told what ends
    the job, on the one rank that reports it; `leave` ends the process.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        peers: Peers,
        *,
        timeout: float,
        has_lost_launcher: Callable[[], bool] = lambda: False,
        on_hang: Callable[[str], object] = lambda verdict: None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._heartbeat = heartbeat
        self._peers = peers
        self._timeout = timeout
        self._tick = min(5.0, timeout / 10)
        self._has_lost_launcher = has_lost_launcher
        self._on_hang = on_hang
        self._leave = leave
        self._file = peers.run_folder / RUN_FILES.logs / f"rank{peers.rank}.log"
        self._stacks = self._open()
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._peers.publish()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self._stacks.close()

    def _open(self) -> TextIO:
        try:
            self._file.parent.mkdir(exist_ok=True)
            return self._file.open("a")
        except OSError:  # stacks are lost then; hangs are still found
            return open(os.devnull, "a")

    def _watch(self) -> None:
        beats, idle = -1, 0.0
        last = time.monotonic()
        while not self._stop.wait(self._tick):
            now = time.monotonic()
            # A suspended process wakes up after hours: that was no hang.
            idle += min(now - last, 2 * self._tick)
            last = now
            if self._heartbeat.count != beats:
                beats, idle = self._heartbeat.count, 0.0
            limit = self._limit()
            faulthandler.dump_traceback_later(limit + self._tick, file=self._stacks)
            if idle < min(self._timeout, limit) / 2:
                continue
            self._publish(idle)
            if idle >= limit or self._peers.is_hang_announced:
                self._end(idle)
                return

    def _limit(self) -> float:
        limit = self._timeout
        if limit > ORPHAN_SECONDS and self._has_lost_launcher():
            limit = ORPHAN_SECONDS
        return limit * SLOW_FACTOR if self._heartbeat.is_slow else limit

    def _publish(self, idle: float, *, has_dumped: bool = False) -> None:
        heart = self._heartbeat
        self._peers.publish(
            step=heart.step,
            phase=heart.phase,
            count=heart.count,
            idle_seconds=round(idle, 1),
            where=_innermost(self._main),
            has_dumped=has_dumped,
        )

    def _end(self, idle: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._peers.announce_hang()
        self._note(f"rank {self._peers.rank} made no progress for {idle:.0f} s; stacks:")
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._publish(idle, has_dumped=True)
        notes = self._answers()
        reason = explain_hang(notes, self._peers.world_size, self._peers.role_of)
        verdict = (
            f"{reason}; no progress for {idle:.0f} s "
            f"(trainer.watchdog_timeout); stacks of all ranks: "
            f"{self._file.parent}{os.sep}rank*.log; continue with "
            f"`toolkit resume {self._peers.run_folder}`"
        )
        self._note(verdict)
        if self._peers.rank == min(notes, default=self._peers.rank):
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"error: {verdict}\n")
                sys.stderr.flush()
            # It may hang like everything else.
            thread = Thread(target=self._on_hang, args=(verdict,), daemon=True)
            thread.start()
            thread.join(timeout=5)
        else:
            time.sleep(2.0)  # its line comes before the launcher sees any rank end
        for handler in logging.getLogger("toolkit").handlers:
            with contextlib.suppress(Exception):
                handler.flush()
        self._leave(EXIT_FAILED)

    def _note(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stacks.write(line + "\n")
            self._stacks.flush()

    def _answers(self) -> dict[int, RankNote]:
        """The notes of the ranks that show their stacks too, once they had time for it."""
        deadline = time.monotonic() + 2 * self._tick + 2.0
        while True:
            notes = {r: n for r, n in self._peers.notes().items() if n.has_dumped}
            if len(notes) == self._peers.world_size or time.monotonic() > deadline:
                return notes
            time.sleep(0.1)


def explain_hang(
    notes: Mapping[int, RankNote],
    world_size: int,
    role_of: Callable[[int], str] = lambda rank: "",
) -> str:
    """Who keeps whom waiting, from what the ranks that answer say of themselves."""
    silent = [rank for rank in range(world_size) if rank not in notes]
    if silent:
        shown = (f"{r} ({role})" if (role := role_of(r)) else f"{r}" for r in silent[:8])
        ranks = ", ".join(shown) + (", ..." if silent[8:] else "")
        one = next(iter(notes.values()), None)
        others = f"; the others wait at step {one.step}, {one.phase}" if one else ""
        plural = "s give" if len(silent) > 1 else " gives"
        return f"rank{plural} no sign of life, dead or frozen: {ranks}{others}"
    if world_size == 1:
        return f"training stands still: {notes[0].describe()}"
    fewest = min(note.count for note in notes.values())
    behind = [note for note in notes.values() if note.count == fewest]
    ahead = [note for note in notes.values() if note.count > fewest]
    if ahead:
        names = "; ".join(note.describe() for note in behind[:4])
        return f"{names}; the others wait at step {ahead[0].step}, {ahead[0].phase}"
    places: dict[str, list[RankNote]] = {}
    for note in notes.values():
        places.setdefault(note.where, []).append(note)
    if len(places) == 1:
        return f"a collective hangs, all ranks wait in it: {behind[0].describe()}"
    rare = sorted(places.values(), key=len)[:2]
    return "; ".join(group[0].describe() for group in rare)


def _innermost(thread: int) -> str:
    """`file.py:12 in function` of a thread of this process."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
