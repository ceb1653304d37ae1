"""Everything a run folder tells about its run, gathered for whoever shows it.

Lists, pages, comparisons, reports and model cards read it here, so that all of them say the same.
"""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.secrets import mask_secrets
from toolkit.errors import RunError
from toolkit.metrics.history import read_history
from toolkit.runs.files import CHECKPOINT_METADATA, RUN_FILES
from toolkit.runs.notes import read_notes
from toolkit.runs.progress import Progress, read_progress
from toolkit.runs.status import (
    RunRecord,
    RunStatus,
    current_state,
    full_record,
    not_a_run,
    read_status,
    unix_seconds,
    utc_text,
)
from toolkit.storage.foreign import read_json

_STEP = re.compile(r"step(\d{1,18})\Z")
_MAX_METADATA_BYTES = 1 << 30
_MOST = 10_000
"""Attempts that are looked at."""


class AttemptFacts(msgspec.Struct, kw_only=True):
    """One start of a run."""

    number: int
    """From 1."""
    started: str | None
    """ISO 8601 in UTC."""
    ended: str | None
    """None: it is running."""
    state: str
    """As `RunFacts.state`; "unknown" where a release before kept nothing of it."""
    reason: str | None = None
    """One word, as `RunStatus.exit_reason`."""
    message: str | None = None
    host: str | None = None
    first_step: int | None = None
    """Of its lines in train.jsonl, which lacks steps that a later attempt went back behind."""
    last_step: int | None = None
    done_again: int = 0
    """Steps at its end that no later attempt built on: they were trained once more."""

    @property
    def seconds(self) -> float | None:
        """How long it took, until now where it is running; None: not known."""
        begin = unix_seconds(self.started or "")
        end = time.time() if self.ended is None else unix_seconds(self.ended)
        return None if begin is None or end is None else max(0.0, end - begin)


class SavedCheckpoint(msgspec.Struct, kw_only=True):
    """A committed checkpoint; its files are not looked at."""

    step: int
    tokens: int | None = None
    kind: str = "permanent"
    """"permanent", "ephemeral" or "fixed"."""
    scores: dict[str, float] = {}
    """Results of the evaluation at this step, as "val/loss"."""
    folder: str = ""
    extra: dict[str, Any] = {}
    """What else its metadata tells: model, optimizer, versions, data."""


class RunFacts(msgspec.Struct, kw_only=True):
    """What is known of a run. None, or empty: it is not."""

    folder: str
    """Absolute path."""
    record: RunRecord
    """What lists show, with the state by the run's lock now."""
    status: RunStatus
    progress: Progress
    tags: list[str]
    note: str
    attempts: list[AttemptFacts]
    """From the first."""
    config: dict[str, Any]
    """metadata/config.json, as it was stored."""
    origins: dict[str, str]
    """Path of a value -> where it came from; values without one are defaults."""
    command: dict[str, Any]
    """Command line that the run was started with: argv, cwd, python, started; secrets masked."""
    resumes: list[dict[str, Any]]
    """Those of the attempts that went on since, from the first."""
    git: dict[str, Any]
    """Repository, commit, branch, dirty."""
    environment: dict[str, Any]
    """Python, versions, host, processors, GPUs, launcher variables."""
    engine: dict[str, Any]
    """What decides how numbers are rounded: engine, processes, precision, device, kernels."""
    data: dict[str, Any]
    """Identity of the training data, by the newest checkpoint: fingerprint, seed, order."""
    checkpoints: list[SavedCheckpoint]
    """By step."""

    @property
    def id(self) -> str:
        """Eight hexadecimal digits, the same wherever the run is moved or copied to."""
        return str(self.record.id)

    @property
    def title(self) -> str:
        """`experiment/name`."""
        return f"{self.record.experiment}/{self.record.name}"

    @property
    def cwd(self) -> str | None:
        """What relative paths of `config` are relative to: where the newest command was given."""
        found = [*([self.command] if self.command else []), *self.resumes]
        return str(found[-1]["cwd"]) if found and "cwd" in found[-1] else None

    @property
    def age(self) -> float | None:
        """Seconds since the run was first started."""
        created = unix_seconds(self.record.created)
        return None if created is None else max(0.0, time.time() - created)

    @property
    def seconds(self) -> float | None:
        """How long all attempts took together; None: not known."""
        spans = [attempt.seconds for attempt in self.attempts]
        return None if None in spans else sum(span for span in spans if span is not None)


def run_facts(run_dir: Path) -> RunFacts:
    """Read a run folder; also while it trains.

    Raises:
        RunError: `run_dir` is no run. Other files that are missing or damaged are empty facts.
    """
    folder = run_dir.resolve()
    status = read_status(folder)
    if status is None:
        raise not_a_run(run_dir)
    progress, notes = read_progress(folder), read_notes(folder)
    record = full_record(folder, status, progress)
    record.state = current_state(folder, status)
    checkpoints = saved_checkpoints(folder)
    data: Any = next((c.extra["data"] for c in reversed(checkpoints) if "data" in c.extra), {})
    command, resumes = _commands(folder, status.attempt)
    facts = RunFacts(
        folder=str(folder),
        record=record,
        status=status,
        progress=progress,
        tags=notes.tags,
        note=notes.note,
        attempts=_attempts(folder, status, record.state, progress),
        config=_read(folder, RUN_FILES.config),
        origins={k: str(v) for k, v in _read(folder, RUN_FILES.origins).items()},
        command=command,
        resumes=resumes,
        git=_read(folder, RUN_FILES.git),
        environment=_read(folder, RUN_FILES.environment),
        engine=_read(folder, RUN_FILES.engine),
        data=data if isinstance(data, dict) else {},
        checkpoints=checkpoints,
    )
    record.seconds = facts.seconds
    return facts


def saved_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    """The committed checkpoints of a run folder, by step."""
    found = []
    with contextlib.suppress(OSError):
        for path in (folder / RUN_FILES.checkpoints).iterdir():
            if (match := _STEP.match(path.name)) is None:
                continue
            with contextlib.suppress(OSError, RunError):
                saved = read_json(
                    path / CHECKPOINT_METADATA,
                    RunError,
                    SavedCheckpoint,
                    max_bytes=_MAX_METADATA_BYTES,
                )
                saved.step, saved.folder = int(match[1]), str(path)
                found.append(saved)
    return sorted(found, key=lambda saved: saved.step)


def _read(folder: Path, file: str) -> dict[str, Any]:
    try:
        return read_json(folder / file, RunError)
    except (FileNotFoundError, RunError):
        return {}


def _commands(folder: Path, newest: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The command that started the run, and those that resumed it since."""
    kept = (_read(folder, _command_file(number)) for number in range(1, min(newest, _MOST)))
    found = [mask_secrets(one) for one in (*kept, _read(folder, RUN_FILES.command)) if one]
    starts = [place for place, one in enumerate(found) if not _is_resume(one)]
    begin = starts[-1] if starts else 0
    return (found[begin] if found else {}), found[begin + 1 :]


def _is_resume(command: dict[str, Any]) -> bool:
    argv = command.get("argv")
    return isinstance(argv, list) and argv[1:2] == ["resume"]


def _command_file(attempt: int) -> str:
    """What a later attempt leaves of the command line of this one."""
    return RUN_FILES.command.replace(".json", f".attempt{attempt}.json")


def _attempts(
    folder: Path, status: RunStatus, state: str, progress: Progress
) -> list[AttemptFacts]:
    ended: str | None = None
    if state != "running":
        ended = status.updated
        if state == "dead" and progress.time is not None and 0 <= progress.time < 1e11:
            ended = max(ended, utc_text(progress.time))
    found = {
        before.attempt: AttemptFacts(
            number=before.attempt,
            started=before.started,
            ended=before.ended,
            state=before.state,
            reason=before.exit_reason,
            message=before.message,
            host=before.host,
            last_step=before.step,
        )
        for before in status.attempts
        if before.attempt < status.attempt
    }
    found[status.attempt] = AttemptFacts(
        number=status.attempt,
        started=status.started,
        ended=ended,
        state=state,
        reason=status.exit_reason,
        message=status.message,
        host=status.host,
        last_step=status.step,
    )
    if status.attempt == 1:
        found[1].first_step = None if progress.step is None else 1
        found[1].last_step = progress.step if progress.step is not None else status.step
        return [found[1]]
    _add_lines(folder, status.attempt, found)
    return [found[number] for number in sorted(found)]


def _add_lines(folder: Path, newest: int, found: dict[int, AttemptFacts]) -> None:
    """What train.jsonl tells of attempts, the only witness of those of earlier releases."""
    series = None
    with contextlib.suppress(RunError):
        series = read_history(folder, ["attempt"], streams=["train"]).train.get("attempt")
    kept = 0
    for number in range(1, min(newest, _MOST) + 1):
        if number not in found:
            started = _read(folder, _command_file(number))
            known = started.get("started") if started.get("attempt") == number else None
            found[number] = AttemptFacts(
                number=number, started=known, ended="", state="unknown", first_step=None
            )
        if series is None:
            continue
        mine = series.value == number
        if mine.any():
            steps, times = series.step[mine], series.time[mine]
            about = found[number]
            about.first_step = int(steps[0])
            about.last_step = max(int(steps[-1]), about.last_step or 0)
            if about.state == "unknown" and 0 <= times[-1] < 1e11:
                about.started = about.started or utc_text(float(times[0]))
                about.ended = utc_text(float(times[-1]))
            kept = int(steps[-1])
        if number < newest:
            found[number].done_again = max(0, (found[number].last_step or 0) - kept)
