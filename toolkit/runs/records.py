"""`RunRecord`: one line of `toolkit runs`, one row of the registry."""

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec

from toolkit.errors import RunError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import RunStatus, current_state, read_status
from toolkit.storage.foreign import check_regular, read_lines


class RunRecord(msgspec.Struct, kw_only=True):
    """What the registry knows of a run; the columns of its table, in order."""

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

    @classmethod
    def from_status(cls, folder: Path, status: RunStatus) -> "RunRecord":
        """The record of a run whose status is known."""
        values: dict[str, Any] = {
            field: getattr(status, field) for field in cls.__struct_fields__ if field != "folder"
        }
        return cls(folder=str(folder), **values)


def record_of(folder: Path) -> RunRecord | None:
    """The record of a run folder as it is now: state by its lock, progress by its newest metrics.

    None when the folder is not a run.
    """
    status = read_status(folder)
    if status is None:
        return None
    record = RunRecord.from_status(folder, status)
    record.state = current_state(folder, status)
    newest = last_metrics(folder / RUN_FILES.train_metrics)
    step = newest.get("step")
    if isinstance(step, int) and step >= (record.step or 0):
        record.step = step
        tokens, loss = newest.get("tokens"), newest.get("loss")
        record.tokens = int(tokens) if isinstance(tokens, int | float) else record.tokens
        record.loss = float(loss) if isinstance(loss, int | float | str) else record.loss
    return record


def read_last_step(path: Path) -> int:
    """The last step that a metrics file tells of, however its end looks; 0: none."""
    step = last_metrics(path).get("step")
    if isinstance(step, int):
        return step
    found = 0
    try:
        for line in read_lines(path, RunError):
            with contextlib.suppress(msgspec.MsgspecError, RecursionError):
                found = max(found, msgspec.json.decode(line, type=_Step).step)
    except (OSError, RunError):
        return 0
    return found


class _Step(msgspec.Struct):
    step: int


def last_metrics(path: Path, *, tail_bytes: int = 16_384) -> dict[str, Any]:
    """The last whole line of a metrics file, found from its end; empty when there is none."""
    try:
        check_regular(path, RunError)
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - tail_bytes))
            lines = file.read().splitlines(keepends=True)
    except (OSError, RunError):
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                return msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.MsgspecError, RecursionError):
                continue
    return {}
