"""What the targets `local` and `ssh` share: a script in the run folder, a process per machine."""

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

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
from toolkit.commands.launch.target import OVER, JobStatus, LaunchError, Record, Submission, Target
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import read_status
from toolkit.storage.atomic import write_atomic

SECONDS_TO_FAIL = 2.0
"""How long a job must live to count as started."""


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
        lines = ["#!/bin/bash", "# Arguments: the number of the machine.", "set -u"]
        return "\n".join([*lines, *job.preamble(), f"exec {job.start} {what} {flags}".rstrip(), ""])

    def start(self, job: Job, rank: int, host: Host) -> str:
        """The script that starts machine `rank`'s process."""
        file = f"{job.run.folder}/{RUN_FILES.launch_script}"
        words = f"bash {shlex.quote(file)} {rank}"
        return start_script(words, shlex.quote(self.log(job.run.folder, rank, host)))

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
        status = read_status(folder)
        before = status.attempt if status is not None else 0
        processes: list[Process] = []
        try:
            for rank, host in enumerate(hosts):
                processes.append(started(host.run(self.start(job, rank, host))))
            time.sleep(SECONDS_TO_FAIL)
            self._check_alive(job, hosts, processes)
        except BaseException:
            for host, process in zip(hosts, processes, strict=False):
                with contextlib.suppress(LaunchError):
                    ask_to_end(host, process, now=True)
            raise
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
            reason = reason or "it ended at once, without a word"
            raise LaunchError(f"{host.label}: {reason.removeprefix('error: ')} (from {log})")

    def status(self, record: Record) -> JobStatus:
        processes = [Process(*pair) for pair in record.details["processes"]]
        pairs = list(zip(self.hosts_used(), processes, strict=True))
        alive = [host.label for host, process in pairs if is_running(host, process)]
        if alive:
            lacking = len(pairs) - len(alive)
            detail = f"on {first_words(alive)}" + (f"; {lacking} ended" if lacking else "")
            return JobStatus("running", detail)
        run = read_status(Path(record.folder))
        if run is not None and run.attempt > record.details["attempt"] and run.state in OVER:
            return JobStatus(run.state, run.message or "")
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
        for host, pair in zip(self.hosts_used(), record.details["processes"], strict=True):
            ask_to_end(host, Process(*pair), now=now)
        return "ended" if now else "asked to save a checkpoint and end"


def last_error(log: Path) -> str | None:
    """The last line of a log that begins with `error:`; None: there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65_536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in reversed(lines) if line.startswith("error: ")), None)
