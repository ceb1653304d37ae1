"""What the targets `local` and `ssh` share: a script in the run folder, a process per machine."""

import contextlib
import functools
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from toolkit.commands.launch.follow import follow_files
from toolkit.commands.launch.hosts import (
    Host,
    Process,
    ask_to_end,
    first_words,
    is_running,
    start_script,
    started,
)
from toolkit.commands.launch.job import Job
from toolkit.commands.launch.records import attempt_of, told_by_run
from toolkit.commands.launch.target import OVER, JobStatus, LaunchError, Record, Submission, Target
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import read_status
from toolkit.storage.atomic import write_atomic

SECONDS_TO_FAIL = 2.0
"""How long a job must live to count as started."""
_TELL_STATUS = """trap 'echo "error: exit status $? before the run began" >&2' EXIT"""
"""Of a line of --setup that ends the script, or a Python that is not there."""
_SECONDS = 0.1
"""Between two looks whether it lives."""

T = TypeVar("T")


class OnHosts(Target, kw_only=True):
    """A run on machines without a scheduler, which share the run folder."""

    def hosts_used(self) -> list[Host]:
        """The machines, the first of them machine 0."""
        raise NotImplementedError

    def head(self) -> str:
        """Address of machine 0, for the others."""
        return ""

    def script(self, job: Job) -> str:
        """What each machine runs; its first argument is the number of the machine."""
        run = job.run
        flags = job.flags(rank='"$1"', head=shlex.quote(self.head()))
        what = f"train {shlex.quote(run.config_file)} --save-folder {shlex.quote(run.folder)}"
        lines = ["#!/bin/bash", "# Arguments: the number of the machine.", _TELL_STATUS]
        return "\n".join([*lines, *job.preamble(), f"exec {job.start} {what} {flags}".rstrip(), ""])

    def start(self, job: Job, rank: int, host: Host) -> str:
        """The script that starts machine `rank`'s process."""
        file = f"{job.run.folder}/{RUN_FILES.launch_script}"
        words = f"bash {shlex.quote(file)} {rank}"
        log, note = self.log(job.run.folder, rank, host), self.note(job.run.folder, rank)
        return start_script(words, shlex.quote(log), shlex.quote(str(note)))

    def note(self, folder: str, rank: int) -> Path:
        """Where machine `rank` notes its process, while the job is submitted."""
        return Path(folder) / RUN_FILES.metadata / f"launch-{rank}.pid"

    def log(self, folder: str, rank: int, host: Host) -> str:
        """The log of machine `rank`."""
        return f"{folder}/{RUN_FILES.logs}/launch-{rank}-{host.label}.log"

    def render(self, job: Job) -> str:
        parts = [f"# {job.run.folder}/{RUN_FILES.launch_script}:\n{self.script(job)}"]
        for rank, host in enumerate(self.hosts_used()):
            parts.append(
                f"# {shlex.join(host.command)} <<'END'\n{self.start(job, rank, host)}# END\n"
            )
        return "\n".join(parts)

    def probe(self, job: Job, hosts: Sequence[Host]) -> None:
        """Raise LaunchError where a machine cannot run the job."""

    def submit(self, job: Job) -> Submission:
        hosts, folder = self.hosts_used(), Path(job.run.folder)
        self.probe(job, hosts)
        write_atomic(folder / RUN_FILES.launch_script, self.script(job).encode())
        before = attempt_of(job.run.folder)
        notes = [self.note(job.run.folder, rank) for rank in range(len(hosts))]
        processes: list[Process] = []
        try:
            for note in notes:
                note.write_text("")
            for rank, host in enumerate(hosts):
                processes.append(started(host.run(self.start(job, rank, host))))
            until = time.monotonic() + SECONDS_TO_FAIL
            while True:
                is_last = time.monotonic() >= until
                self._check_alive(job, hosts, processes)
                if is_last:
                    break
                time.sleep(_SECONDS)
        except BaseException as error:
            lost = _withdraw(hosts, notes)
            if lost and isinstance(error, LaunchError):
                what = f"what was started on {first_words(lost)}"
                raise LaunchError(f"{error}; {what} cannot be ended from here: see there") from None
            raise
        finally:
            for note in notes:
                note.unlink(missing_ok=True)
        names = [
            f"{process.pid}@{host.label}" for host, process in zip(hosts, processes, strict=True)
        ]
        details = {"processes": [list(process) for process in processes], "attempt": before}
        return Submission((",".join(names),), details)

    def _check_alive(self, job: Job, hosts: Sequence[Host], processes: list[Process]) -> None:
        for rank, (host, process) in enumerate(zip(hosts, processes, strict=True)):
            if is_running(host, process):
                continue
            log = Path(self.log(job.run.folder, rank, host))
            reason = last_error(log)
            status = read_status(Path(job.run.folder))
            if reason is None and status is not None and status.state == "finished":
                continue
            reason = (reason or "it ended at once, without a word").removeprefix("error: ")
            # A log that says no more than this line goes with the rest of the job.
            is_all = len(hosts) == 1 and _says_only(log, reason)
            raise LaunchError(f"{host.label}: {reason}" + ("" if is_all else f" (from {log})"))

    def status(self, record: Record) -> JobStatus:
        processes = [Process(*pair) for pair in record.details["processes"]]
        pairs = list(zip(self.hosts_used(), processes, strict=True))
        answers, errors = _ask_each(pairs, is_running)
        told = told_by_run(record, record.details["attempt"])
        if alive := [host.label for host, is_alive in answers if is_alive]:
            lacking = len(answers) - len(alive)
            detail = f"on {first_words(alive)}" + (f"; {lacking} ended" if lacking else "")
            if told is not None:
                detail += f"; its run has {told.state}, the rest ends soon"
            return JobStatus("running", "; ".join([detail, *map(str, errors.values())]))
        if told is not None:
            return told
        if errors:
            raise next(iter(errors.values()))
        logs = (Path(self.log(record.folder, r, host)) for r, (host, _) in enumerate(pairs))
        reasons = [reason for log in logs if (reason := last_error(log)) is not None]
        return JobStatus("failed", reasons[0] if reasons else "the processes are gone")

    def logs(self, record: Record, *, follow: bool) -> Iterator[str]:
        files = [
            Path(self.log(record.folder, rank, host)) for rank, host in enumerate(self.hosts_used())
        ]
        is_over = (lambda: self.status(record).state in OVER) if follow else None
        yield from follow_files(lambda: files, is_over)

    def stop(self, record: Record, *, now: bool) -> str:
        told = told_by_run(record, record.details["attempt"])
        if told is not None and told.state == "finished" and not now:
            return "its run has finished, there is nobody to ask (--now ends what is left of it)"
        processes = (Process(*pair) for pair in record.details["processes"])
        pairs = list(zip(self.hosts_used(), processes, strict=True))
        answers, errors = _ask_each(pairs, functools.partial(ask_to_end, now=now))
        asked = [host.label for host, is_asked in answers if is_asked]
        done = "ended" if now else "asked to save a checkpoint and end"
        if errors:
            others = f"; {done} on {first_words(asked)}" if asked else ""
            raise LaunchError("; ".join(map(str, errors.values())) + others)
        if not asked:
            return "ended before"
        return done if len(asked) == len(pairs) else f"{done} on {first_words(asked)}"


def _ask_each(
    pairs: Sequence[tuple[Host, Process]], ask: Callable[[Host, Process], T]
) -> tuple[list[tuple[Host, T]], dict[str, LaunchError]]:
    """What each machine answers, and by name why others do not. All are asked, whoever is down."""
    answers, errors = [], {}
    for host, process in pairs:
        try:
            answers.append((host, ask(host, process)))
        except LaunchError as error:
            errors[host.label] = error
    return answers, errors


def _withdraw(hosts: Sequence[Host], notes: Sequence[Path]) -> list[str]:
    """End what has been started, as the machines' notes tell; the machines that cannot be asked."""
    said: list[tuple[Host, str]] = []
    for host, note in zip(hosts, notes, strict=True):
        with contextlib.suppress(OSError):
            said.append((host, note.read_text()))
            note.unlink()  # who comes now starts nothing
    begun = [(host, started(text)) for host, text in said if text.strip()]
    _, errors = _ask_each(begun, functools.partial(ask_to_end, now=True))
    return list(errors)


def _says_only(log: Path, reason: str) -> bool:
    """Whether a log holds nothing, or `reason` alone."""
    try:
        return log.stat().st_size < 4096 and log.read_text(errors="replace").strip() in (
            "",
            f"error: {reason}",
        )
    except OSError:
        return True


def last_error(log: Path) -> str | None:
    """The last line of a log that begins with `error:`; None: there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65_536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)
