"""One writer per run folder.

Two things together make the lock, because neither is enough alone:

1. `metadata/lock`: a lock of the operating system (`filelock`). It goes away with the process,
   however that ends, so on one host it is the whole truth.
2. `metadata/lock.json`: who holds it, rewritten every 15 seconds. It speaks across hosts, where
   many network file systems keep locks of the first kind to themselves.

A lock is stale, and taken over, when its holder is a dead process of this host, or a process of
another host whose heartbeat stopped for 90 seconds. Other hosts' clocks are not trusted: the age
of a heartbeat is the difference of two modification times of the same file system, and while it
is young, we watch whether it moves.
"""

import atexit
import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import msgspec

from toolkit.errors import RunError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import write_json_atomic

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

    def describe(self) -> str:
        """`pid 1234 on host since 2026-01-01T00:00:00Z`."""
        return f"pid {self.pid} on {self.host} since {self.started}"


def utc_now() -> str:
    """The time as `2026-01-01T00:00:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_lock_info(folder: Path) -> LockInfo | None:
    """Who holds, or last held without releasing, the lock of a run folder; None: nobody."""
    try:
        return msgspec.json.decode((folder / RUN_FILES.lock_info).read_bytes(), type=LockInfo)
    except (OSError, msgspec.MsgspecError):
        return None


def is_locked(folder: Path, *, stale_seconds: float = STALE_SECONDS) -> bool:
    """Whether a live writer holds the run folder. Only looks; never disturbs the writer."""
    info = read_lock_info(folder)
    if info is None:
        return False
    young = _heartbeat_age(folder) < stale_seconds
    return _is_running(info, young=young) if info.host == socket.gethostname() else young


class RunLock:
    """The exclusive lock of a run folder, held from `acquire` until `release` or process death."""

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        import filelock

        self.folder = folder
        self.heartbeat_seconds = heartbeat_seconds
        self.stale_seconds = stale_seconds
        self._lock = filelock.FileLock(folder / RUN_FILES.lock, thread_local=False)
        self._info_path = folder / RUN_FILES.lock_info
        self._info: LockInfo | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = False

    @property
    def lost(self) -> bool:
        """True when another process took the lock over (this one was suspended for too long)."""
        # A process that just woke up must not wait for its next heartbeat to learn of it.
        if not self._lost and self._info is not None:
            current = read_lock_info(self.folder)
            self._lost = current is not None and current.token != self._info.token
        return self._lost

    def acquire(self) -> None:
        """Take the lock, or take over a stale one.

        Raises:
            RunError: when a live process holds it, naming host, pid and since when.
        """
        self._acquire_system_lock()
        try:
            self._wait_for_other_host()
            self._info = _own_info()
            write_json_atomic(self._info_path, self._info)
        except BaseException:
            self._lock.release()
            raise
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the lock back; more than once is fine. A forked child releases nothing."""
        info, self._info = self._info, None
        if info is None or info.pid != os.getpid():
            return
        atexit.unregister(self.release)
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        current = read_lock_info(self.folder)
        if current is not None and current.token == info.token:
            with contextlib.suppress(OSError):
                self._info_path.unlink(missing_ok=True)
        self._lock.release()

    def _acquire_system_lock(self) -> None:
        import filelock

        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            with contextlib.suppress(filelock.Timeout):
                self._lock.acquire(timeout=0)
                return
            info = read_lock_info(self.folder)
            if info is not None and info.host != socket.gethostname():
                raise self._held_error(info)
            young = _heartbeat_age(self.folder) < self.stale_seconds
            if info is not None and _is_running(info, young=young):
                raise self._held_error(info)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if info is None:
            raise RunError(
                f"{self.folder}: locked by another process; wait for it, or choose another folder"
            )
        # The recorded holder is dead, yet its lock lives on: a child inherited it, or the file
        # system has no locks and a marker file was left. A new file means a new lock.
        log.warning("%s: taking over the lock of dead %s", self.folder, info.describe())
        (self.folder / RUN_FILES.lock).unlink(missing_ok=True)
        try:
            self._lock.acquire(timeout=_SETTLE_SECONDS)
        except filelock.Timeout:
            raise self._held_error(read_lock_info(self.folder) or info) from None

    def _wait_for_other_host(self) -> None:
        """Return when no live process of another host holds lock.json."""
        info = read_lock_info(self.folder)
        if info is None or info.host == socket.gethostname():
            return
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
                return
            if current.heartbeat != info.heartbeat or current.token != info.token:
                raise self._held_error(current)
        log.warning("%s: taking over the stale lock of %s", self.folder, info.describe())

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
            info.heartbeat = f"{utc_now()[:-1]}.{time.time_ns() % 10**9 // 10**6:03d}Z"
            try:
                write_json_atomic(self._info_path, info, sync=False)
            except OSError as error:
                log.warning("%s: could not refresh the run lock: %s", self.folder, error)

    def _held_error(self, info: LockInfo) -> RunError:
        return RunError(
            f"{self.folder}: another process is writing this run ({info.describe()}); "
            "wait for it, stop it, or choose another folder"
        )


def _own_info() -> LockInfo:
    import psutil

    now = utc_now()
    return LockInfo(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        started=now,
        heartbeat=now,
        token=secrets.token_hex(8),
    )


def _heartbeat_age(folder: Path) -> float:
    try:
        return time.time() - (folder / RUN_FILES.lock_info).stat().st_mtime
    except OSError:
        return float("inf")


def _is_running(info: LockInfo, *, young: bool) -> bool:
    """Whether the holder of a lock of this host lives.

    A process with its pid but another start is a later one, unless the heartbeat is `young`:
    start times shift when the clock is set.
    """
    import psutil

    try:
        process = psutil.Process(info.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return young or abs(process.create_time() - info.process_started) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
