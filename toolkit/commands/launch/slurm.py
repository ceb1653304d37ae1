"""`--to slurm`: a batch script, submitted with `sbatch`.

The script runs one task on each node, which starts the processes there. A while before the time
limit, or before Slurm takes the nodes away, Slurm sends SIGUSR1 to the script, which passes it on:
the run saves a checkpoint and ends, and the script has the job queued again. The next start
continues the run with `toolkit resume`. A start that made no new checkpoint is the last one.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.commands.launch.follow import follow_files
from toolkit.commands.launch.job import Job, plain_name
from toolkit.commands.launch.records import attempt_of, told_by_run
from toolkit.commands.launch.target import (
    OVER,
    JobStatus,
    LaunchError,
    Record,
    State,
    Submission,
    Target,
    check_secrets_here,
    quote_problems,
)
from toolkit.errors import EXIT_STOPPED, ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import write_atomic

_STATES: dict[str, State] = {
    **dict.fromkeys(
        ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD",
         "SPECIAL_EXIT", "SUSPENDED", "STOPPED"),
        "pending",
    ),
    **dict.fromkeys(("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"), "running"),
    "COMPLETED": "finished",
    "CANCELLED": "stopped",
    **dict.fromkeys(
        ("FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
         "REVOKED"),
        "failed",
    ),
}  # fmt: skip
"""What `squeue` and `sacct` call it -> what we do."""

_ENDLESS = ("UNLIMITED", "INFINITE")
_SECONDS = 60
_SECONDS_TO_FOLLOW = 300
"""How long the other nodes have to end by themselves when one of them has ended."""
_REFUSED = re.compile(r"sbatch: (?:error: )?(?:Batch job submission failed: )?")


class _NoAnswer(LaunchError):
    """A program of Slurm may have done what it was told, and does not say."""


class Slurm(Target, kw_only=True):
    """A Slurm cluster, from one of its login nodes."""

    partition: str | None = None
    """Partition, or several: A,B."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit, as Slurm writes it: 4:00:00, 2-12, 90 (minutes)."""
    constraint: str | None = None
    """Features that nodes must have, such as `a100&ib`."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    cpus: int | None = None
    """CPU cores of each node; default: one for each process, with `--exclusive` all."""
    mem: str | None = None
    """Memory of each node, such as 500G."""
    requeue: bool = True
    """Queue the job again when it is stopped at its time limit or its nodes are taken away;
    `--no-requeue` does not."""
    stop_before: int = 300
    """Seconds before the time limit at which the run saves and ends."""
    sbatch: tuple[str, ...] = ()
    """A further line for `#SBATCH`, such as `--mail-type=END`; again for more."""
    seeds: tuple[int, ...] = ()
    """Several runs that differ in `--seed`, as a job array: 1,2,3."""
    array: tuple[str, ...] = ()
    """Overrides of the config for one run of a job array; again for the next run."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from check_secrets_here(self.secret)
        for name in ("partition", "account", "qos", "time", "constraint", "mem"):
            value = getattr(self, name)
            if value is not None and (not value or value.split() != [value]):
                yield name, f"expected one word, not {value!r}"
        for line in self.sbatch:
            if not line.startswith("-") or "\n" in line:
                yield (
                    "sbatch",
                    f"write an option of sbatch, as in --sbatch=--nice=100, not {line!r}",
                )
        limit = _seconds(self.time) if self.time is not None else None
        if (
            self.time
            and self.time.split() == [self.time]
            and limit is None
            and self.time.upper() not in _ENDLESS
        ):
            yield (
                "time",
                f"no time limit of Slurm: {self.time!r}; write M, M:S, H:M:S, D-H, D-H:M or "
                "D-H:M:S, or UNLIMITED",
            )
        if limit and limit <= self.stop_before:  # 0: no limit
            yield "time", f"{self.time} leaves no time before --stop-before {self.stop_before}"
        if self.stop_before < 10:
            yield "stop_before", f"give the run 10 seconds at least, not {self.stop_before}"
        if self.cpus is not None and self.cpus < 1:
            yield "cpus", f"must be 1 or more, not {self.cpus}"
        if self.seeds and self.array:
            yield "seeds", "and --array; put --seed=N into each --array"
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", f"a seed stands there twice: {list(self.seeds)}"
        for words in self.array:
            yield from quote_problems("array", words)
        if self.port is not None and self.port + len(self.array or self.seeds) > 65536:
            yield (
                "port",
                f"each run of the array has its own port, from {self.port} on; choose less",
            )

    def members(self) -> Sequence[Sequence[str]]:
        if self.seeds:
            return [[f"--seed={seed}"] for seed in self.seeds]
        return [shlex.split(words) for words in self.array] or [[]]

    def check_folder(self, folder: str, work_dir: str | None) -> None:
        if '"' in folder or "\\" in folder:
            problem = f"{folder}: sbatch takes no quotes and backslashes in the name of a log"
            raise ConfigError(problem, key="--save-folder")

    def render(self, job: Job) -> str:
        return "\n".join([*self._directives(job), *self._body(job)]) + "\n"

    def _directives(self, job: Job) -> list[str]:
        several = len(job.members) > 1
        folder = _prefix(job).replace("%", "%%") + ("%a" if several else "")
        log = f"{folder}/{RUN_FILES.logs}/slurm-{'%A_%a' if several else '%j'}.log"
        lines = [
            f"--job-name={plain_name(job.name)}",
            f"--nodes={job.nodes}",
            "--ntasks-per-node=1",
            None if not self.gpus else f"--gpus-per-node={self.gpus}",
            None if self._cpus(job) is None else f"--cpus-per-task={self._cpus(job)}",
            None if self.mem is None else f"--mem={self.mem}",
            *(
                f"--{name}={value}"
                for name in ("partition", "account", "qos", "time", "constraint")
                if (value := getattr(self, name)) is not None
            ),
            "--exclusive" if self.exclusive else None,
            f"--array=1-{len(job.members)}" if several else None,
            "--requeue" if self.requeue else "--no-requeue",
            f"--signal=B:USR1@{self.stop_before}",
            f'--output="{log}"',
            "--open-mode=append",
            *self.sbatch,
        ]
        return ["#!/bin/bash", *(f"#SBATCH {line}" for line in lines if line is not None)]

    def _cpus(self, job: Job) -> int | None:
        return self.cpus or (None if self.exclusive else job.processes)

    def _body(self, job: Job) -> list[str]:
        on_several = job.nodes > 1
        # A task is no rank, whatever Slurm's variables say.
        task = 'unset SLURM_STEP_NUM_TASKS; exec "$@"'
        cpus = "" if self._cpus(job) is None else f" --cpus-per-task={self._cpus(job)}"
        several = len(job.members) > 1
        # Several runs may have the same machine 0.
        port = f"$(({job.port} + SLURM_ARRAY_TASK_ID - 1))" if several else None
        flags = job.flags(head='"$head"', port=port)
        return [
            "# What `toolkit launch` submitted; a change here changes nothing.",
            *job.preamble(),
            "set -u",  # what a site's own files do is not ours
            f"run={shlex.quote(_prefix(job))}" + ('"$SLURM_ARRAY_TASK_ID"' if several else ""),
            f'what=(train "$run/{RUN_FILES.launch_config}" --save-folder "$run")',
            f'[ ! -f "$run/{RUN_FILES.config}" ] || [ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ] ||'
            ' what=(resume "$run")',
            *(
                ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
                if on_several
                else []
            ),
            f'newest() {{ ls "$run/{RUN_FILES.checkpoints}" 2>/dev/null | grep -E "^step[0-9]+$" |'
            " sort -V | tail -n 1; }",
            "before=$(newest)",
            "asked= step=",
            "trap 'asked=1 interrupted=1; kill -USR1 \"$step\"' USR1",
            "# One task a node, which starts the node's processes itself.",
            f"srun --ntasks-per-node=1{cpus} --kill-on-bad-exit=0 --wait={_SECONDS_TO_FOLLOW} \\",
            f"  bash -c '{task}{_RANK if on_several else ''}' task \\",
            f'  {job.start} "${{what[@]}}" {flags}'.rstrip() + " &",
            "step=$!",
            *_WAIT,
            *(_REQUEUE if self.requeue else []),
            'exit "$code"',
        ]

    def submit(self, job: Job) -> Submission:
        _program("sbatch")
        script = Path(job.members[0].folder) / RUN_FILES.launch_script
        write_atomic(script, self.render(job).encode())
        attempts = [attempt_of(member.folder) for member in job.members]
        try:
            said = _call("sbatch", "--parsable", str(script))
            number, _, cluster = said.strip().rpartition("\n")[2].partition(";")
            if not number.isdecimal():
                raise _NoAnswer(f"sbatch answers {said.strip()!r}, which is no number of a job")
        except _NoAnswer as error:
            raise LaunchError(f"{error}{_withdrawn(script)}") from None
        several = len(job.members) > 1
        ids = [f"{number}_{i}" if several else number for i in range(1, len(job.members) + 1)]
        details: dict[str, Any] = {"attempts": dict(zip(ids, attempts, strict=True))}
        return Submission(tuple(ids), details | ({"cluster": cluster} if cluster else {}))

    def status(self, record: Record) -> JobStatus:
        where = _cluster(record)
        _program("squeue")
        try:
            said = _call("squeue", *where, "--noheader", f"--jobs={record.id}", "--format=%T|%R")
        except LaunchError as error:
            if "nvalid job id" not in str(error):
                raise
            said = ""
        if line := said.strip():
            state, _, reason = line.splitlines()[0].partition("|")
            return JobStatus(_STATES.get(state, "unknown"), f"{state} {reason}".strip())
        # A cluster without accounts forgets a job; its run does not.
        attempt = record.details.get("attempts", {}).get(record.id, 0)
        lost = JobStatus("failed", "no longer in the queue, and its run has told no end")
        return _from_accounts(record) or told_by_run(record, attempt) or lost

    def logs(self, record: Record, *, follow: bool) -> Iterator[str]:
        folder = Path(record.folder) / RUN_FILES.logs
        is_over = (lambda: self.status(record).state in OVER) if follow else None
        yield from follow_files(lambda: sorted(folder.glob(f"slurm-{record.id}.log")), is_over)

    def stop(self, record: Record, *, now: bool) -> str:
        status = self.status(record)
        if status.state in OVER:
            return f"ended before ({status.detail})"
        if now or status.state != "running":
            _call("scancel", *_cluster(record), record.id)
            return "cancelled"
        # Not to the script: it would queue the job again.
        _call("scancel", *_cluster(record), "--signal=USR2", record.id)
        return "asked to save a checkpoint and end"


_RANK = ' --node-rank "$SLURM_NODEID"'

_WAIT = [
    "# A signal ends `wait`, and not the task.",
    "code=0",
    "while :; do",
    '  interrupted=; wait "$step"; last=$?',
    '  [ "$last" -eq 127 ] || code=$last',
    '  [ -n "$interrupted" ] || break',
    "done",
]

_REQUEUE = [
    f'if [ -n "$asked" ] && [ "$code" -eq {EXIT_STOPPED} ]; then',
    '  if [ "$(newest)" = "$before" ]; then',
    '    echo "no new checkpoint since the start: not queued again; ask for more --time" >&2',
    '  elif scontrol requeue "$SLURM_JOB_ID"; then',
    "    exit 0",
    "  else",
    '    echo "Slurm does not queue the job again; toolkit launch --save-folder $run goes on" >&2',
    "  fi",
    "fi",
]


def _seconds(limit: str) -> int | None:
    """A time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None: another word."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, days or "0"]) or len(parts) > 3:
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return seconds + 86_400 * int(days or 0)


def _prefix(job: Job) -> str:
    """The run folder; of an array what comes before the number of the run."""
    folder = job.members[0].folder
    return folder if len(job.members) == 1 else folder.removesuffix("1")


def _cluster(record: Record) -> list[str]:
    cluster = record.details.get("cluster")
    return [f"--clusters={cluster}"] if cluster else []


def _from_accounts(record: Record) -> JobStatus | None:
    """What `sacct` says of a job that ended; None: it says nothing, or there are no accounts."""
    if shutil.which("sacct") is None:
        return None
    options = ("--noheader", "--parsable2", "--allocations", "--format=State,ExitCode,Elapsed")
    try:
        said = _call("sacct", *_cluster(record), *options, f"--jobs={record.id}").strip()
    except LaunchError as error:
        if "disabled" not in str(error):
            raise
        return None
    if not said:
        return None
    state, code, elapsed = said.rpartition("\n")[2].split("|")
    code = code.partition(":")[0]
    found = "stopped" if code == str(EXIT_STOPPED) else _STATES.get(state.split()[0])
    detail = f"{state}, exit code {code}, after {elapsed}"
    return None if found is None else JobStatus(found, detail)


def _withdrawn(script: Path) -> str:
    """Cancel the jobs of `script`, which `sbatch` may have queued without saying so; a remark."""
    try:
        mine = f"--user={os.getuid()}"
        lines = _call("squeue", mine, "--noheader", "--format=%F|%o").splitlines()
        jobs = {
            number for number, _, file in (x.partition("|") for x in lines) if file == str(script)
        }
        for number in jobs:
            _call("scancel", number)
    except LaunchError:
        return "; if it queued the job all the same, `squeue --me` shows it and `scancel` ends it"
    return f"; job {', '.join(sorted(jobs))}, which it had queued, is cancelled" if jobs else ""


def _program(name: str) -> None:
    if shutil.which(name) is None:
        raise LaunchError(
            f"no `{name}` on this machine, so there is no Slurm here; log in to a node of the "
            "cluster, or show the script with --dry-run"
        )


def _call(*words: str) -> str:
    """What a program of Slurm prints. Raises LaunchError: it refuses, with its reason."""
    _program(words[0])
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SECONDS, check=False,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _NoAnswer(f"{words[0]}: no answer for {_SECONDS} s; is the scheduler up?") from None
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    reasons = [line for line in lines if "error:" in line] or lines
    text = "; ".join(_REFUSED.sub("", line) for line in reasons[-3:])
    raise LaunchError(f"{words[0]}: {text.removeprefix(f'{words[0]}: ').removeprefix('error: ')}")
