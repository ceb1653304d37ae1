"""The process of a mirror: copies a run folder to a URL until training ends, and then what is left.

It talks with training in lines. From there: `Job`, "push" when the run has begun, "end" when it is
over. To there: "done" when everything was sent, "lost" when another process has the lease, and
lines for the log behind their level. It ends with training, whatever that dies of.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import msgspec

from toolkit import signals
from toolkit.checkpoint.retention import Retention
from toolkit.errors import ToolkitError
from toolkit.launch.pushing import Pusher, push_all
from toolkit.runs.lease import Lease
from toolkit.runs.lock import LockInfo
from toolkit.storage.remote import RemoteFolder, Retries
from toolkit.threads import Thread, Worker

_NICE = 19
"""Training goes first where processors are few: it keeps 98.5% of one that both want."""
_LONGEST_PAUSE = 60.0
_PR_SET_PDEATHSIG = 1


class Job(msgspec.Struct, frozen=True):
    """What to copy."""

    folder: str
    url: str
    lease: LockInfo
    rule: tuple[Any, ...]
    """Of `Retention`."""
    parent: int
    interval: float
    heartbeat: float


def main() -> None:
    """The process: copies until training ends, and then what is left."""
    signals.ignore_in_worker()  # training is asked to stop, and tells us when it has
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    copying = _Copying(job, out)
    with contextlib.suppress(Exception):
        copying.greet()
    os.nice(_NICE)
    copying.run()


class _Copying:
    """The process at work."""

    def __init__(self, job: Job, out: IO[bytes]) -> None:
        self._job, self._out = job, out
        self._turn = threading.Lock()
        self._push, self._end = threading.Event(), threading.Event()
        remote = RemoteFolder(job.url, retries=Retries(3, 0.5, 5.0))
        self._pusher = Pusher(
            Path(job.folder), remote, Retention(*job.rule), check=self._check_lease
        )
        self._lease = Lease(remote, info=job.lease, heartbeat_seconds=job.heartbeat)
        self._has_begun = False
        self._checkpoints = Worker("checkpoints")
        self._sending: Future[None] | None = None

    def greet(self) -> None:
        """Ask the store for something: it loads libraries, seconds of work that training, which has
        not begun, does not feel."""
        self._lease.is_ours()

    def run(self) -> None:
        logging.getLogger("toolkit").addHandler(_Telling(self._tell))
        for target in (self._read_words, self._watch_parent):
            Thread(target=target, name=target.__name__, daemon=True).start()
        with self._lease.kept(self._lose, self._start_again):
            self._push.wait()
            self._copy()

    def _copy(self) -> None:
        pause, has_warned = 0.0, False
        while True:
            is_over = self._end.wait(pause)
            try:
                self._look(is_over=is_over)
            except Exception as error:
                if not has_warned:
                    has_warned = True
                    self._tell(
                        "warning", f"{_line(error)}; training goes on, and it is tried again"
                    )
                longest = 2.0 if is_over else _LONGEST_PAUSE
                pause = min(max(1.0, 2 * pause), longest)
                if is_over:
                    time.sleep(pause)
                continue
            if has_warned:
                has_warned = False
                self._tell("info", f"{self._job.url}: is up to date again")
            if is_over:
                self._tell("done", "")
                os._exit(0)
            pause = self._job.interval

    def _look(self, *, is_over: bool) -> None:
        """Send what there is; checkpoints beside it, for which metrics do not wait."""
        self._check_lease()
        if not self._has_begun:
            self._pusher.begin()
            self._has_begun = True
        steps = self._pusher.committed()
        failed = self._pusher.push_files()
        if self._sending is not None and (is_over or self._sending.done()):
            sending, self._sending = self._sending, None
            sending.result()
        if is_over:
            push_all(self._pusher)
        elif self._sending is None:
            # One: by the next look there may be a newer one.
            self._sending = self._checkpoints.submit(lambda: self._send_bulk(steps[:1]))
        if failed is not None:
            raise failed

    def _check_lease(self) -> None:
        """Send nothing before we know that the lease is still ours."""
        if not self._lease.check():
            self._lose()

    def _lose(self) -> None:
        self._tell("lost", str(self._lease.lost_error()))
        os._exit(0)

    def _send_bulk(self, steps: list[int]) -> None:
        self._pusher.push_checkpoints(steps)
        failed = self._pusher.push_files(bulky=True)
        if failed is not None:
            raise failed

    def _start_again(self) -> None:
        self._tell("warning", f"{self._job.url}: was removed; all of it is sent again")
        os._exit(0)

    def _read_words(self) -> None:
        for word in iter(sys.stdin.buffer.readline, b""):
            if word.strip() == b"end":
                self._end.set()
                if not self._push.is_set():  # the run never began
                    os._exit(0)
            self._push.set()
        os._exit(0)  # training is gone

    def _watch_parent(self) -> None:
        """A process that training forked may hold the pipe open."""
        while os.getppid() == self._job.parent:
            time.sleep(1.0)
        os._exit(0)

    def _tell(self, word: str, text: str) -> None:
        with self._turn, contextlib.suppress(OSError):
            self._out.write(f"{word} {' '.join(text.split())}\n".encode())
            self._out.flush()


class _Telling(logging.Handler):
    """What other modules warn of, told by training."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell("warning", record.getMessage())


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ToolkitError) else f"{type(error).__name__}: {text}"
