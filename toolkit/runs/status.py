"""How far a run came and how it ended: metadata/status.json, and the record of a run in lists."""

import calendar
import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from toolkit.errors import RunError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import is_locked
from toolkit.runs.notes import read_notes
from toolkit.runs.progress import Progress, read_progress
from toolkit.storage.foreign import read_json

RunState = Literal["running", "finished", "failed", "stopped"]
"""`stopped`: on request, with a committed checkpoint; `toolkit resume` continues."""

WALL_TIME = "trainer.max_wall_time"
STOP_FILE = "the stop file"
FAILURE = "failure"
FINISH = "a callback"
"""Why a run stops, beside a signal's name. `FINISH`: it is complete, earlier than planned."""


class EndedAttempt(msgspec.Struct, kw_only=True):
    """An attempt before the one that a status tells of."""

    attempt: int
    started: str
    ended: str
    state: str
    """"dead": the process vanished; `ended` is the last that was heard of it."""
    exit_reason: str | None = None
    message: str | None = None
    host: str
    step: int | None = None
    """The last one that it is known to have done."""


class RunStatus(msgspec.Struct, kw_only=True):
    """Content of status.json. `None` is "not known (yet)"."""

    state: RunState
    id: str | None = None
    """Eight hexadecimal digits that stay the run's wherever it is moved, whatever it is called;
    None: of a release before there were any, see `id_of`."""
    experiment: str
    name: str
    attempt: int
    """1 for the first start, one more for each resume."""
    step: int | None = None
    """Optimizer steps done."""
    tokens: int | None = None
    """Training tokens consumed."""
    loss: float | None = None
    """Newest training loss that was recorded, perhaps of a step before `step`."""
    message: str | None = None
    """Why the run ended or what it waits for."""
    exit_reason: str | None = None
    """One word for programs, for example `signal`, `hard_stop`, `error`."""
    created: str
    """First start of the run, ISO 8601 in UTC."""
    started: str
    """Start of this attempt."""
    updated: str
    """Last change of this file."""
    host: str
    pid: int
    world_size: int | None = None
    engine: str | None = None
    parameters: int | None = None
    """Parameters of the model."""
    attempts: list[EndedAttempt] = []
    """The earlier ones, as far as they were recorded: releases before this field kept none."""
    other: dict[str, Any] = {}
    """Whatever else was given to `set_status`."""


class _StoredRun(msgspec.Struct):
    mirror: str | None = None


class _StoredConfig(msgspec.Struct):
    """What the list of runs asks of a config."""

    run: _StoredRun = msgspec.field(default_factory=_StoredRun)


class RunRecord(msgspec.Struct, kw_only=True):
    """A line of `toolkit runs`, a row of the registry: its columns, in order."""

    folder: str
    """Absolute path, the key."""
    experiment: str
    name: str
    state: str
    """A `RunState`; in lists also "dead" (the process vanished) or "missing" (the folder did)."""
    step: int | None = None
    tokens: int | None = None
    loss: float | None = None
    created: str
    updated: str
    host: str
    engine: str | None = None
    world_size: int | None = None
    parameters: int | None = None
    mirror: str | None = None
    """`run.mirror` of its config, where the run is too."""
    attempt: int | None = None
    val_loss: float | None = None
    """Newest validation loss."""
    val_step: int | None = None
    best_val_loss: float | None = None
    """The least that is a number."""
    best_val_step: int | None = None
    tokens_per_second: float | None = None
    """Median of the newest steps, all processes together."""
    seconds: float | None = None
    """How long all attempts took together; None where an earlier one was not recorded."""
    tags: str | None = None
    """With commas between them."""
    note: str | None = None
    id: str | None = None
    """See `RunStatus.id`; always there."""

    def __post_init__(self) -> None:
        if self.id is None:
            self.id = id_of(self.created, self.experiment, self.name)

    @classmethod
    def from_status(cls, folder: Path, status: RunStatus, mirror: str | None = None) -> "RunRecord":
        """The record of a run whose status is known."""
        fields = {*cls.__struct_fields__} & {*status.__struct_fields__}
        known = {field: getattr(status, field) for field in fields}
        return cls(folder=str(folder), mirror=mirror, seconds=seconds_of(status), **known)


def id_of(created: str, experiment: str, name: str) -> str:
    """`RunStatus.id` of a run that was first started as this; two machines may do so in the same
    second, and what is asked for by it then has several answers."""
    words = f"{created} {experiment}/{name}".encode(errors="surrogateescape")
    return hashlib.blake2b(words, digest_size=4).hexdigest()


def unix_seconds(text: str) -> float | None:
    """The time that `utc_now` wrote; None for other text."""
    with contextlib.suppress(ValueError):
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    return None


def utc_text(seconds: float) -> str:
    """Unix seconds as `utc_now` writes them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def seconds_of(status: RunStatus) -> float | None:
    """How long all attempts took until the status was written; see `RunRecord.seconds`."""
    if len(status.attempts) != status.attempt - 1:
        return None
    spans = [(a.started, a.ended) for a in status.attempts] + [(status.started, status.updated)]
    total = 0.0
    for started, ended in spans:
        begin, end = unix_seconds(started), unix_seconds(ended)
        if begin is None or end is None:
            return None
        total += max(0.0, end - begin)
    return total


def mirror_of(folder: Path) -> str | None:
    """`run.mirror` of the config that a run folder keeps; None where it has none."""
    try:
        return read_json(folder / RUN_FILES.config, RunError, _StoredConfig).run.mirror
    except (FileNotFoundError, RunError):
        return None


def read_status(folder: Path) -> RunStatus | None:
    """The status of a run folder; None when the folder is not a run."""
    try:
        return read_json(folder / RUN_FILES.status, RunError, RunStatus)
    except (FileNotFoundError, RunError):
        return None


def not_a_run(folder: Path) -> RunError:
    """Why a command that needs a run cannot take `folder`, and what helps."""
    if not (folder / RUN_FILES.config).is_file():
        problem = "not a run folder" if folder.is_dir() else "no such run folder"
        return RunError(f"{folder}: {problem}; `toolkit runs` lists runs")
    return RunError(
        f"{folder}: its {RUN_FILES.status} is missing or damaged; go on in a new run: "
        f"toolkit train {folder / RUN_FILES.config} --name NEW_NAME --trainer.load_path={folder}"
    )


def current_state(folder: Path, status: RunStatus) -> str:
    """`status.state`, or "dead" when it says running but no process holds the lock."""
    return "dead" if status.state == "running" and not is_locked(folder) else status.state


def record_of(folder: Path) -> RunRecord | None:
    """The record of a run folder as it is now: state by its lock, progress by its metrics. None
    when the folder is not a run."""
    status = read_status(folder)
    if status is None:
        return None
    record = full_record(folder, status)
    record.state = current_state(folder, status)
    return record


def full_record(folder: Path, status: RunStatus, progress: Progress | None = None) -> RunRecord:
    """The record of a run of this status; what metrics and notes tell is read."""
    record = RunRecord.from_status(folder, status, mirror_of(folder))
    notes, progress = read_notes(folder), progress or read_progress(folder)
    record.tags, record.note = ",".join(notes.tags) or None, notes.note or None
    record.val_loss, record.val_step = progress.val_loss, progress.val_step
    record.best_val_loss, record.best_val_step = progress.best_val_loss, progress.best_val_step
    record.tokens_per_second = progress.tokens_per_second
    if progress.step is None:
        return record
    # The status may know of later steps, whose metrics were lost, but of no later loss.
    record.loss = record.loss if progress.loss is None else progress.loss
    if progress.step >= (record.step or 0):
        record.step = progress.step
        record.tokens = record.tokens if progress.tokens is None else progress.tokens
    return record
