"""One writer per run folder.

`metadata/lock.json` says who writes: it is there while a writer is, who rewrites it every 15
seconds. It is stale, and taken over, when the writer is a dead process of this machine (same boot,
same process ids), or a process of another one whose heartbeat stopped for 90 seconds. Other clocks
are not trusted: the age of a heartbeat is the difference of two modification times of the same file
system, and while it is young, we watch whether it moves.

Of two that come at the same time one gets through. On one machine they take turns by a lock of the
operating system (`metadata/lock`). Across machines, where many network file systems have no such
locks, lock.json is created, not replaced, where there is none; who takes over a stale one looks
again whether another machine did the same. A writer that was suspended and taken over notices
before it writes again.
"""

import atexit
import contextlib
import errno
import logging
import os
import secrets
import socket
import threading
import time
from functools import cache
from pathlib import Path

import msgspec

from toolkit.errors import RunError
from toolkit.parents import is_alive
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import create_json, write_json_atomic
from toolkit.storage.foreign import read_json
from toolkit.storage.locks import locked
from toolkit.threads import Thread

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 90.0
"""Six missed heartbeats: longer than a network file system's usual hiccup."""

_SETTLE_SECONDS = 5.0
"""A new holder may need this long to write lock.json after it got the system's lock."""


class LockInfo(msgspec.Struct, kw_only=True):
    """Content of metadata/lock.json."""

    host: str
    pid: int
    process_started: float
    """Start of the process (Unix seconds): tells it from a later one with the same pid."""
    started: str
    """When the lock was taken, ISO 8601 in UTC."""
    heartbeat: str
    """When the holder last wrote this file."""
    token: str
    """Unique to this acquisition."""
    machine: str = ""
    """Boot and process id namespace: where `pid` means something. Empty: `host` tells."""

    @property
    def is_here(self) -> bool:
        """Whether the holder is, or was, a process of this machine."""
        return self.host == socket.gethostname() and self.machine in ("", _machine())

    def describe(self) -> str:
        """`pid 1234 on host since 2026-01-01T00:00:00Z`."""
        return f"pid {self.pid} on {self.host} since {self.started}"


def utc_now() -> str:
    """The time as `2026-01-01T00:00:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def heartbeat_now() -> str:
    """`utc_now` with milliseconds: every heartbeat differs from the one before."""
    return f"{utc_now()[:-1]}.{time.time_ns() % 10**9 // 10**6:03d}Z"


def read_lock_info(folder: Path) -> LockInfo | None:
    """Who holds, or last held without releasing, the lock of a run folder; None: nobody."""
    try:
        return read_json(folder / RUN_FILES.lock_info, RunError, LockInfo)
    except (FileNotFoundError, RunError):
        return None


def is_locked(folder: Path, *, stale_seconds: float = STALE_SECONDS) -> bool:
    """Whether a live writer holds the run folder. Only looks; never disturbs the writer."""
    info = read_lock_info(folder)
    if info is None:
        return False
    young = _is_young(folder, stale_seconds)
    return is_running(info, young=young) if info.is_here else young


class RunLock:
    """The exclusive lock of a run folder, held from `acquire` until `release` or process death."""

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self.folder = folder
        self.heartbeat_seconds = heartbeat_seconds
        self.stale_seconds = stale_seconds
        self._info_path = folder / RUN_FILES.lock_info
        self._info: LockInfo | None = None
        self._stop = threading.Event()
        self._thread: Thread | None = None
        self._lost = False
        self._checked_at = 0.0

    @property
    def lost(self) -> bool:
        """True when another process took the lock over (this one was suspended for too long)."""
        # A process that just woke up must not wait for its next heartbeat to learn of it.
        if not self._lost and self._info is not None:
            self._checked_at = time.time()
            other = self._find_other(self._info)
            self._lost = other is not None and other is not self._info
        return self._lost

    @property
    def is_ours(self) -> bool:
        """Whether lock.json is there and names this acquisition."""
        return self._info is not None and self._find_other(self._info) is None

    @property
    def was_suspended(self) -> bool:
        """Whether nobody has looked for a takeover for longer than the heartbeat should allow."""
        return time.time() - self._checked_at > 2 * self.heartbeat_seconds

    def acquire(self) -> None:
        """Take the lock, or take over a stale one.

        Raises:
            RunError: when a live process holds it, naming host, pid and since when; or its files
                cannot be written.
        """
        try:
            self._acquire()
        except RunError:
            self._info = None
            raise
        except OSError as error:
            self._info = None
            path = error.filename or self.folder / RUN_FILES.lock
            raise RunError(
                f"{path}: {error.strerror or error}, so the run cannot be locked; move it away, or "
                "make it writable"
            ) from None
        self._stop.clear()
        self._thread = Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def _acquire(self) -> None:
        for name in (RUN_FILES.lock, RUN_FILES.lock_info):
            if (self.folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder", str(self.folder / name))
        deadline = time.monotonic() + 2 * _SETTLE_SECONDS
        while True:
            # A child of a dead process may hold it for ever.
            with locked(self.folder / RUN_FILES.lock, wait=False) as is_my_turn:
                dead = self._check_holder()
                if is_my_turn or time.monotonic() > deadline:
                    if dead is not None:
                        log.warning("%s: taking over the lock of %s", self.folder, dead.describe())
                    is_taken_over = self._wait_for_other_machine()
                    self._publish(is_taken_over=is_taken_over or not is_my_turn)
                    return
            time.sleep(0.05)

    def release(self) -> None:
        """Give the lock back; more than once is fine. A forked child releases nothing."""
        info, self._info = self._info, None
        if info is None or info.pid != os.getpid():
            return
        atexit.unregister(self.release)
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._find_other(info) is None:
            with contextlib.suppress(OSError):
                self._info_path.unlink(missing_ok=True)

    def _check_holder(self) -> LockInfo | None:
        """Refuse where a process of this machine holds the lock; who it was where it is dead."""
        info = read_lock_info(self.folder)
        if info is None or not info.is_here:
            return None
        if is_running(info, young=_is_young(self.folder, self.stale_seconds)):
            raise self._held_error(info)
        return info

    def _wait_for_other_machine(self) -> bool:
        """Return when no live process of another machine holds lock.json: whether a dead one
        does."""
        info = read_lock_info(self.folder)
        if info is None or info.is_here:
            return False
        last_seen = self._info_path.stat().st_mtime
        os.utime(self.folder / RUN_FILES.lock)
        age = (self.folder / RUN_FILES.lock).stat().st_mtime - last_seen
        if age < self.stale_seconds:
            log.warning(
                "%s: last written %.0f s ago by %s; watching for up to %.0f s whether it lives",
                self.folder, age, info.describe(), self.stale_seconds - age,
            )  # fmt: skip
        deadline = time.monotonic() + self.stale_seconds - age
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self.heartbeat_seconds))
            current = read_lock_info(self.folder)
            if current is None:
                return False
            if current.heartbeat != info.heartbeat or current.token != info.token:
                raise self._held_error(current)
        log.warning("%s: taking over the stale lock of %s", self.folder, info.describe())
        return True

    def _publish(self, *, is_taken_over: bool) -> None:
        """Write lock.json; of two machines that come at the same time, one gets through."""
        info = self._info = own_info()
        self._checked_at = time.time()
        if read_lock_info(self.folder) is None:
            if create_json(self._info_path, info):
                return
            current = read_lock_info(self.folder)
            if current is not None:
                raise self._held_error(current)
            is_taken_over = True  # what is there cannot be read
        write_json_atomic(self._info_path, info)
        if is_taken_over:
            time.sleep(min(_SETTLE_SECONDS, self.stale_seconds))
            if (other := self._find_other(info)) is not None:
                raise self._held_error(other)

    def _find_other(self, own: LockInfo) -> LockInfo | None:
        """Who lock.json names instead of `own`; `own` itself where there is no such file."""
        current = read_lock_info(self.folder)
        return None if current is not None and current.token == own.token else current or own

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_seconds):
            info = self._info
            if info is None:
                return
            if self.lost:
                log.error(
                    "%s: the lock was taken over; this process must not write there", self.folder
                )
                return
            info.heartbeat = heartbeat_now()
            try:
                write_json_atomic(self._info_path, info, sync=False)
            except OSError as error:
                log.warning("%s: could not refresh the run lock: %s", self.folder, error)

    def _held_error(self, info: LockInfo) -> RunError:
        return RunError(
            f"{self.folder}: another process is writing this run ({info.describe()}); "
            "wait for it, stop it, or choose another folder"
        )


@cache
def _machine() -> str:
    """What makes process ids comparable; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def own_info() -> LockInfo:
    """Of this process, with a new token."""
    import psutil

    now = utc_now()
    return LockInfo(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        started=now,
        heartbeat=now,
        token=secrets.token_hex(8),
        machine=_machine(),
    )


def _is_young(folder: Path, stale_seconds: float) -> bool:
    """Whether there was a heartbeat in the last `stale_seconds`."""
    try:
        return time.time() - (folder / RUN_FILES.lock_info).stat().st_mtime < stale_seconds
    except OSError:
        return False


def is_running(info: LockInfo, *, young: bool) -> bool:
    """Whether the holder of a lock of this machine lives. While the heartbeat is `young`, its start
    does not matter: start times shift when the clock is set."""
    return is_alive(info.pid, None if young else info.process_started)
