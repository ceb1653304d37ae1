"""One writer per run at a URL: `lock.py` for stores, which have neither locks nor renames.

`lease.json` names the writer, who rewrites it every 15 seconds and takes it away at its end. It is
created where there is none, which stores like S3 and GCS let only one of several do. A stale one is
taken over: that of a dead process of this machine at once, any other after 90 seconds without a
heartbeat. No clock of another machine is asked: its age is the difference of two times of the store
(it, and a file written now), and while it is young we watch whether it changes.

Of several that take over, or create where the store cannot refuse, the last one to write has it:
each looks again after a moment, and with every heartbeat.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from toolkit.errors import RunError, StorageError, ToolkitError
from toolkit.runs.lock import (
    HEARTBEAT_SECONDS,
    STALE_SECONDS,
    LockInfo,
    heartbeat_now,
    is_running,
    own_info,
)
from toolkit.storage.atomic import encode_json
from toolkit.storage.remote import RemoteFolder
from toolkit.threads import Thread

log = logging.getLogger(__name__)

now: Callable[[], float] = functools.partial(
    time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
)
"""Seconds that nobody sets; where the system can, the time of a suspension counts."""

LEASE_FILE = "lease.json"
_PROBE = "probe-"
_SETTLE_SECONDS = 2.0
"""A request of another taker may still be on its way."""


class Lease:
    """The right to write the run at `folder`, from `acquire` until `release`.

    info: of a lease that another process of this run has acquired, and that this one keeps alive.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        *,
        info: LockInfo | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        settle_seconds: float = _SETTLE_SECONDS,
    ) -> None:
        self.info = info or own_info()
        self.heartbeat_seconds = heartbeat_seconds
        self.beaten_at = float("-inf")
        """By `now`."""
        self._folder = folder
        self._stale_seconds = stale_seconds
        self._settle_seconds = settle_seconds
        self._now: float | None = None
        """By the store's clock, when we looked."""

    def probe(self) -> None:
        """Check that we may write, read and remove here, before `acquire`. Raises StorageError."""
        name, data = f"{_PROBE}{self.info.token}", self.info.token.encode()
        self._folder.write(name, data)
        if self._folder.read(name) != data:
            raise StorageError(f"{self._folder}: what is written there reads back differently")
        self._now = self._folder.modified(name)
        self._folder.delete([name])

    def acquire(self) -> None:
        """Take it, or take a stale one over.

        Raises:
            RunError: a live process has it, naming host and pid.
            StorageError: the store is out of reach, or refuses.
        """
        while not self._folder.create(LEASE_FILE, encode_json(self.info)):
            holder = self._read()
            if holder is None:  # given back just now
                time.sleep(0.1)
                continue
            if holder.token == self.info.token:
                return  # an answer that was lost
            is_dead = holder.is_here and not is_running(holder, young=True)
            if not is_dead and not self._watch(holder):
                continue
            log.warning("%s: taking over from %s", self._folder, holder.describe())
            self._folder.write(LEASE_FILE, encode_json(self.info))
            time.sleep(self._settle_seconds)
            other = self._read()
            if other is not None and other.token != self.info.token:
                raise self._held_error(other)
            return

    def beat(self) -> bool:
        """Say that the writer lives; False: another one has taken over.

        Raises:
            FileNotFoundError: it was gone, perhaps with all of the folder, and is there again.
            StorageError: the store is out of reach.
        """
        holder = self._read()
        if holder is not None and holder.token != self.info.token:
            return False
        self.info.heartbeat = heartbeat_now()
        self._folder.write(LEASE_FILE, encode_json(self.info))
        if holder is None:
            raise FileNotFoundError(f"{self._folder}/{LEASE_FILE}")
        return True

    @contextlib.contextmanager
    def kept(self, on_lost: Callable[[], object], on_gone: Callable[[], object]) -> Iterator[None]:
        """Beat inside the block, in a thread. `on_lost`: another one has taken over; `on_gone`: it
        had been removed, perhaps with all of the folder. A store out of reach is asked again."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self.heartbeat_seconds):
                try:
                    if not self.beat():
                        on_lost()
                        return
                    self.beaten_at = now()
                except FileNotFoundError:
                    on_gone()
                except ToolkitError:
                    pass  # who writes says so

        thread = Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(_SETTLE_SECONDS)

    def check(self) -> bool:
        """Whether it is ours: asked of the store after a time out of reach, or suspended."""
        if now() - self.beaten_at > 2 * self.heartbeat_seconds:
            if not self.is_ours():
                return False
            self.beaten_at = now()
        return True

    def is_ours(self) -> bool:
        """Whether it names this writer. Raises StorageError."""
        holder = self._read()
        return holder is not None and holder.token == self.info.token

    def release(self) -> None:
        """Give it back. Raises StorageError."""
        if self.is_ours():
            self._folder.delete([LEASE_FILE])

    def lost_error(self) -> RunError:
        """Why a run whose lease is another's must end."""
        return RunError(
            f"{self._folder}: another process took this run over while this one was suspended, or "
            "did not reach the store; it stops, and writes nothing more there"
        )

    def _watch(self, holder: LockInfo) -> bool:
        """Whether the holder shows no life until its lease is stale; False: it gave it back.
        RunError: it lives."""
        age = 0.0
        with contextlib.suppress(FileNotFoundError):
            written = self._folder.modified(LEASE_FILE)
            if written is not None and self._now is not None:
                age = max(0.0, self._now - written)
        if age < self._stale_seconds:
            log.warning(
                "%s: last written %.0f s ago by %s; watching for up to %.0f s whether it lives",
                self._folder, age, holder.describe(), self._stale_seconds - age,
            )  # fmt: skip
        deadline = time.monotonic() + self._stale_seconds - age
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.heartbeat_seconds))
            current = self._read()
            if current is None:
                return False
            if (current.heartbeat, current.token) != (holder.heartbeat, holder.token):
                raise self._held_error(current)
        return True

    def _read(self) -> LockInfo | None:
        return read_lease(self._folder)

    def _held_error(self, holder: LockInfo) -> RunError:
        return RunError(
            f"{self._folder}: another process is writing this run ({holder.describe()}); wait for "
            "it, stop it, or choose another URL"
        )


def read_lease(folder: RemoteFolder) -> LockInfo | None:
    """Who writes the run at a URL, or last did without giving it back; None: nobody."""
    try:
        return msgspec.json.decode(folder.read(LEASE_FILE), type=LockInfo)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        # Half written, or something else: it lives if it changes.
        raw = "unreadable"
        return LockInfo(
            host=raw, pid=0, process_started=0.0, started=raw, heartbeat=raw, token=raw, machine=raw
        )


def is_leased(folder: RemoteFolder) -> bool:
    """Whether the run at a URL has a writer, as far as one look tells: by the time since its last
    heartbeat, of which this machine's clock may be wrong."""
    holder = read_lease(folder)
    if holder is None:
        return False
    if holder.is_here:
        return is_running(holder, young=True)
    with contextlib.suppress(FileNotFoundError):
        written = folder.modified(LEASE_FILE)
        return written is None or time.time() - written < STALE_SECONDS
    return False


def is_of_lease(name: str) -> bool:
    """Whether a file at a URL is of this module, not of the run."""
    return name == LEASE_FILE or name.startswith(_PROBE)
