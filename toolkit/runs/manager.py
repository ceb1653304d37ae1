"""`RunManager`: one run folder, from its lock to its last status."""

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from toolkit.config import Config
from toolkit.config.secrets import mask_secrets
from toolkit.errors import RunError
from toolkit.metrics.lines import last_record
from toolkit.runs.background import Background
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import RunLock, utc_now
from toolkit.runs.status import (
    EndedAttempt,
    RunState,
    RunStatus,
    id_of,
    read_status,
    utc_text,
)
from toolkit.storage.atomic import encode_json, write_atomic, write_json_atomic
from toolkit.storage.foreign import read_bytes, read_json

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long the end of a run waits for background work: a registry that another process holds."""

_BLOCK = 4096
"""Bytes that a small file occupies on disk anyway."""

_LATEST = 1e11
"""Unix seconds after this are no time."""

_STARTED_FROM = {
    RUN_FILES.config, RUN_FILES.data_config, RUN_FILES.model_config, RUN_FILES.trainer_config,
    RUN_FILES.engine,
}  # fmt: skip
_KNOWN = {"step", "tokens", "loss", "exit_reason", "world_size", "engine", "parameters"}
_KEPT = (*_KNOWN - {"exit_reason"}, "created", "other")
"""Of the status, what a new attempt begins with: `toolkit resume` relaunches by it, also after a
crash before the new values are known."""

Stored = TypeVar("Stored")


class RunMetadata(Mapping[str, Any]):
    """The files of metadata/, by their names in `RUN_FILES`: `run.metadata[RUN_FILES.config]`.

    On ranks other than the main one `log` does nothing.
    """

    def __init__(self, folder: Path, *, attempt: Callable[[], int], is_main: bool) -> None:
        self._folder = folder
        self._attempt = attempt
        self._is_main = is_main
        self._written: set[str] = set()

    def log(self, obj: Any, file: str, *, format: Literal["json", "text"] = "json") -> None:
        """Write a config (or any JSON-like object; or a text) to one of `RUN_FILES`.

        What looks like a secret is masked, except in the config, which a resume starts from and
        which holds none (`check_no_secrets`). What an earlier attempt wrote there stays as
        `<name>.attempt{K}.json` when it differs.
        """
        if not self._is_main:
            return
        if format == "text":
            data = str(mask_secrets(str(obj))).encode()
        elif isinstance(obj, Config):
            data = obj.to_json() + b"\n"
        else:
            if file not in _STARTED_FROM:
                obj = mask_secrets(msgspec.to_builtins(obj, enc_hook=str))
            data = encode_json(obj)
        path = self._folder / file
        if file not in self._written and path.exists():
            before = read_bytes(path, RunError)
            if before == data:
                return
            write_atomic(
                path.with_name(f"{path.stem}.attempt{self._attempt() - 1}{path.suffix}"), before
            )
        self._written.add(file)
        write_atomic(path, data)

    def read(self, file: str, type: type[Stored] = dict) -> Stored:  # type: ignore[assignment]
        """The JSON in one of the files, as `type`. Raises FileNotFoundError, or RunError where it
        cannot be read."""
        return read_json(self._folder / file, RunError, type)

    def __getitem__(self, file: str) -> Any:
        try:
            return self.read(file)
        except FileNotFoundError:
            raise KeyError(file) from None

    def __iter__(self) -> Iterator[str]:
        folder = self._folder / RUN_FILES.metadata
        return (f"{RUN_FILES.metadata}/{path.name}" for path in sorted(folder.glob("*.json")))

    def __len__(self) -> int:
        return len(list(iter(self)))


class RunManager(contextlib.AbstractContextManager["RunManager"]):
    """The folder of one run. Made by `toolkit.runs.registry.start_run`.

    On the main rank it holds the lock and writes metadata and status. On other ranks it is a
    reader of the same folder: writing methods do nothing there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiment: str,
        name: str,
        lock: RunLock | None = None,
        is_main: bool = True,
        on_status: Callable[[Path, RunStatus], None] = lambda folder, status: None,
    ) -> None:
        self.folder = folder
        self.experiment = experiment
        self.name = name
        self.is_main = is_main
        self._lock = lock
        self._on_status = on_status
        self.metadata = RunMetadata(folder, attempt=lambda: self.attempt, is_main=is_main)
        self._closed = False
        self._status_lock = threading.Lock()
        self._background = Background("run-background")
        self._status: RunStatus | None = None
        self._has_warned = False
        self._identity: tuple[int, int] | None = None
        self.replaced: RunError | None = None
        """Set by whoever learns that the run goes on elsewhere: `find_removal` returns it."""
        if is_main:
            self._begin_attempt()
            self._identity = self._look()

    @property
    def attempt(self) -> int:
        """1 for the first start of the run, one more for each resume."""
        if self._status is None:
            self._status = read_status(self.folder)
        if self._status is None:
            raise RunError(
                f"{self.folder}: no run was started here, or this host does not see the folder; "
                "choose a folder on a file system that all hosts share"
            )
        return self._status.attempt

    def path(self, file: str) -> Path:
        """The full path of one of `RUN_FILES`."""
        return self.folder / file

    def log_metadata(
        self, obj: Any, file: str, *, format: Literal["json", "text"] = "json"
    ) -> None:
        """`run.metadata.log`."""
        self.metadata.log(obj, file, format=format)

    def set_status(
        self,
        state: RunState,
        *,
        step: int | None = None,
        tokens: int | None = None,
        message: str | None = None,
        **more: Any,
    ) -> None:
        """Write status.json; values that are not given keep what they were, `message` does not.
        `more` are other fields of `RunStatus`, or anything else for its `other`.

        Any thread may call it. A disk that does not take it is a warning: it never ends a run.
        Raises RunError when another process has taken the run over.
        """
        self._change_status(state, step=step, tokens=tokens, message=message, **more)

    def _change_status(
        self, state: RunState, *, message: str | None = None, is_last: bool = False, **more: Any
    ) -> None:
        if not self.is_main:
            return
        self.check_owner()
        assert self._status is not None
        changes = {k: v for k, v in more.items() if k in _KNOWN and v is not None}
        other = {k: v for k, v in more.items() if k not in _KNOWN}
        with self._status_lock:
            if self._closed and not is_last:
                return  # another thread was about to say that it runs
            self._status = msgspec.structs.replace(
                self._status,
                state=state,
                message=mask_secrets(message),
                updated=utc_now(),
                other=self._status.other | other,
                **changes,
            )
            try:
                self._write_status(is_last=state != "running")
            except OSError as error:
                if not self._has_warned and self.find_removal() is None:
                    log.warning("%s: cannot be written: %s", self.path(RUN_FILES.status), error)
                self._has_warned = True

    def check_owner(self) -> None:
        """Raise RunError when another process has taken the run over."""
        if self._lock is not None and self._lock.lost:
            raise RunError(
                f"{self.folder}: another process took this run over while this one was "
                "suspended; stop this one"
            )

    def check_owner_after_pause(self) -> None:
        """`check_owner` if this process may have been suspended; else as good as free."""
        if self._lock is not None and self._lock.was_suspended:
            self.check_owner()

    def find_removal(self) -> RunError | None:
        """The error to end with where the run folder was removed, moved or replaced; None: it is
        there. Asked before anything is made anew in it."""
        if self.replaced is not None:
            return self.replaced
        if self._identity is None:
            return None
        try:
            if self._look() == self._identity:
                return None
            # Some network file systems number their folders anew.
            if self._lock is not None and self._lock.is_ours:
                return None
        except FileNotFoundError:
            pass
        except OSError:
            return None  # out of reach for now: whoever writes there will tell
        return RunError(
            f"{self.folder}: the run folder was removed or moved while training; nothing more is "
            "written there. If it was moved, `toolkit resume` continues it where it is now"
        )

    def submit(self, job: Callable[[], None], *, key: str | None = None) -> None:
        """Run `job` in the background; see `Background`. `close` waits `CLOSE_SECONDS` for it."""
        self._background.submit(job, key=key)

    def wait(self) -> None:
        """Block until the background work given so far is done."""
        self._background.wait()

    def close(self, state: RunState | None = None, **status: Any) -> None:
        """Write the final status (see `set_status`; without `state` it stays as it is), finish
        background work, give back the lock. More than once is fine."""
        if not self._begin_closing():
            return
        try:
            if state is not None:
                self._change_status(state, is_last=True, **status)
        finally:
            if not self._background.close(CLOSE_SECONDS):
                log.warning(
                    "run registry: does not answer, so it may lack how this run ended; "
                    "`toolkit runs reindex` brings it up to date"
                )
            if self._lock is not None:
                self._lock.release()

    def break_off(self, state: RunState, **status: Any) -> None:
        """Write the final status of a process that ends at once: nothing is waited for, and the
        lock stays, as a dead process's."""
        if self._begin_closing():
            self._change_status(state, is_last=True, **status)

    def _begin_closing(self) -> bool:
        """Whether nobody has closed it yet."""
        with self._status_lock:
            was_closed, self._closed = self._closed, True
        return not was_closed

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close; a run that nobody closed before is finished, or failed when an error came."""
        if error is None:
            self.close("finished")
        else:
            self.close("failed", message=f"{type(error).__name__}: {error}", exit_reason="error")

    def _begin_attempt(self) -> None:
        before = read_status(self.folder)
        now = utc_now()
        kept = {} if before is None else {field: getattr(before, field) for field in _KEPT}
        first = before or self
        born = kept.get("created", now), first.experiment, first.name
        self._status = RunStatus(
            **{"created": now} | kept,
            id=(before and before.id) or id_of(*born),
            state="running",
            experiment=self.experiment,
            name=self.name,
            attempt=before.attempt + 1 if before else 1,
            started=now,
            updated=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            attempts=[] if before is None else [*before.attempts, self._ended(before)],
        )
        self._write_status()

    def _ended(self, before: RunStatus) -> EndedAttempt:
        """How the attempt before this one ended; of one that vanished, when it last wrote."""
        is_dead, ended, step = before.state == "running", before.updated, before.step
        newest = last_record(self.path(RUN_FILES.train_metrics)) if is_dead else {}
        when = newest.get("time")
        is_its = newest.get("attempt") == before.attempt and type(newest["step"]) is int
        if is_its and isinstance(when, int | float) and 0 <= when < _LATEST:
            ended, step = max(ended, utc_text(when)), max(step or 0, newest["step"])
        return EndedAttempt(
            attempt=before.attempt,
            started=before.started,
            ended=ended,
            state="dead" if is_dead else before.state,
            exit_reason=before.exit_reason,
            message=before.message,
            host=before.host,
            step=step,
        )

    def _write_status(self, *, is_last: bool = False) -> None:
        status = self._status
        assert status is not None
        path = self.path(RUN_FILES.status)
        try:
            write_json_atomic(path, status)
        except OSError as error:
            if not is_last or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _overwrite(path, status)
        self.submit(lambda: self._on_status(self.folder, status), key="status")

    def _look(self) -> tuple[int, int]:
        found = self.path(RUN_FILES.metadata).stat()
        return found.st_dev, found.st_ino


def _overwrite(path: Path, status: RunStatus) -> None:
    """Write over the bytes that the file has, for a disk without room for a second one."""
    room = max(_BLOCK, -(-path.stat().st_size // _BLOCK) * _BLOCK)
    data = encode_json(status)
    if len(data) > room:
        data = msgspec.json.encode(
            msgspec.structs.replace(status, message=None, other={}, attempts=[])
        )
    with path.open("r+b", buffering=0) as file:
        # One call, and blanks over what was longer: a reader never sees half of it.
        file.write(data.ljust(path.stat().st_size))
        os.fsync(file.fileno())
