"""`metadata/launch.json`: where the newest job of a run is."""

from pathlib import Path

from toolkit.commands.launch.target import OVER, JobStatus, Record, Target, target_class
from toolkit.config.check import convert
from toolkit.errors import RunError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import read_status
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import read_json
from toolkit.storage.remote import is_url


def write_record(home: Path, record: Record) -> None:
    write_json_atomic(home / RUN_FILES.launch, record)


def read_record(home: Path) -> Record | None:
    """The newest job of a run; None: it has none."""
    try:
        return read_json(home / RUN_FILES.launch, RunError, Record)
    except (FileNotFoundError, NotADirectoryError):
        return None


def attempt_of(folder: str) -> int:
    """The newest attempt of the run in `folder`; 0: it has none."""
    status = read_status(Path(folder))
    return 0 if status is None else status.attempt


def told_by_run(record: Record, before: int) -> JobStatus | None:
    """How a job ended by what its run says; None: no attempt after `before`, the newest one at
    submission, tells an end."""
    run = read_status(Path(record.folder))
    if run is not None and run.attempt > before and run.state in OVER:
        return JobStatus(run.state, run.message or "")
    return None


def target_of(record: Record) -> Target:
    """The target that has the job, with the options it was submitted with."""
    return convert(record.options, target_class(record.target))


def home_of(run: str, *, root: str = "runs") -> Path:
    """The folder that remembers the job of a run: given itself, or by the run's name, or by
    experiment/name. Raises RunError: there is none."""
    if is_url(run):
        raise RunError(
            f"{run}: jobs are found by the folder or name of the run here, not by a URL; "
            "`toolkit jobs` lists those that were launched"
        )
    path = Path(run).expanduser()
    if (path / RUN_FILES.launch).is_file():
        return path
    parts = run.strip("/").split("/")
    if len(parts) <= 2 and all(part not in ("", ".", "..") for part in parts):
        pattern = run.strip("/") if len(parts) == 2 else f"*/{parts[0]}"
        found = sorted(p.parent.parent for p in Path(root).glob(f"{pattern}/{RUN_FILES.launch}"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(map(str, found))
            raise RunError(f"{run}: several runs have this name: {names}; give one of them")
    if not path.is_dir():
        raise RunError(f"{run}: no such run here; `toolkit jobs` lists those that were launched")
    raise RunError(
        f"{run}: was not started by `toolkit launch`, or not from here ({RUN_FILES.launch} is "
        "missing)"
    )


def launched(root: str = "runs") -> list[Path]:
    """The folders of all runs below `root` that have a job, in the order of their names."""
    return sorted(path.parent.parent for path in Path(root).glob(f"*/*/{RUN_FILES.launch}"))
