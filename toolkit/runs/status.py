"""How far a run came and how it ended: metadata/status.json, and the record of a run in lists."""

from pathlib import Path
from typing import Any, Literal

import msgspec

from toolkit.errors import RunError
from toolkit.metrics.lines import last_record
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import is_locked
from toolkit.storage.foreign import read_json

RunState = Literal["running", "finished", "failed", "stopped"]
"""`stopped`: on request, with a committed checkpoint; `toolkit resume` continues."""

WALL_TIME = "trainer.max_wall_time"
STOP_FILE = "the stop file"
FAILURE = "failure"
FINISH = "a callback"
"""Why a run stops, beside a signal's name. `FINISH`: it is complete, earlier than planned."""


class RunStatus(msgspec.Struct, kw_only=True):
    """Content of status.json. `None` is "not known (yet)"."""

    state: RunState
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

    @classmethod
    def from_status(cls, folder: Path, status: RunStatus, mirror: str | None = None) -> "RunRecord":
        """The record of a run whose status is known."""
        fields = set(cls.__struct_fields__) - {"folder", "mirror"}
        known = {field: getattr(status, field) for field in fields}
        return cls(folder=str(folder), mirror=mirror, **known)


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
    """The record of a run folder as it is now: state by its lock, progress by its newest metrics.
    None when the folder is not a run."""
    status = read_status(folder)
    if status is None:
        return None
    record = RunRecord.from_status(folder, status, mirror_of(folder))
    record.state = current_state(folder, status)
    newest = last_record(folder / RUN_FILES.train_metrics)
    if not newest:
        return record
    # The status may know of later steps, whose metrics were lost, but of no later loss.
    loss = newest.get("loss")
    record.loss = float(loss) if isinstance(loss, int | float | str) else record.loss
    if newest["step"] >= (record.step or 0):
        record.step, tokens = int(newest["step"]), newest.get("tokens")
        record.tokens = int(tokens) if isinstance(tokens, int | float) else record.tokens
    return record
