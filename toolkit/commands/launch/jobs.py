"""`toolkit jobs`: the jobs that `toolkit launch` submitted."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from toolkit.commands.launch.records import home_of, launched, read_record, target_of
from toolkit.commands.launch.target import JobStatus, Record
from toolkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ToolkitError
from toolkit.runs.status import RunRecord, record_of

_CODES = {"finished": EXIT_DONE, "failed": EXIT_FAILED, "stopped": EXIT_STOPPED}


class JobReport(NamedTuple):
    """A job and its run, as they are now."""

    home: Path
    record: Record
    status: JobStatus
    run: RunRecord | None
    """None: it has not begun, or this machine does not see its folder."""


def report(run: str) -> JobReport:
    """How a job is. Raises ToolkitError: the run has none, or its target does not answer."""
    home = home_of(run)
    record = _record(home)
    return JobReport(home, record, target_of(record).status(record), record_of(home))


def list_all(root: str) -> list[JobReport]:
    """All jobs of runs below `root`; a target that does not answer, or a damaged record,
    gives "unknown"."""
    reports = []
    for home in launched(root):
        # What stands in the list where launch.json is damaged.
        record = Record(target="-", options={}, id="-", folder=str(home), submitted="", details={})
        try:
            record = _record(home)
            status = target_of(record).status(record)
        except ToolkitError as error:
            status = JobStatus("unknown", str(error))
        reports.append(JobReport(home, record, status, record_of(home)))
    return reports


def logs(run: str, *, follow: bool) -> Iterator[str]:
    """The lines of a job's newest log; see `Target.logs`."""
    record = _record(home_of(run))
    return target_of(record).logs(record, follow=follow)


def stop(run: str, *, now: bool) -> str:
    """End a job; what was done, as a line."""
    home = home_of(run)
    record = _record(home)
    return f"{home}: {record.target} {record.id}: {target_of(record).stop(record, now=now)}"


def exit_code(run: str) -> int:
    """The exit code of a command that watched a job until its end."""
    record = _record(home_of(run))
    return _CODES.get(target_of(record).status(record).state, EXIT_FAILED)


def _record(home: Path) -> Record:
    record = read_record(home)
    assert record is not None, "home_of found it"
    return record
