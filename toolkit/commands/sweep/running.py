"""Starting the points of a sweep, a few at a time, and what came out of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple

import msgspec

from toolkit import signals
from toolkit.commands.sweep.points import Point
from toolkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError, RunError
from toolkit.launch.capacity import capacity_here
from toolkit.launch.workers import toolkit_command
from toolkit.runs.registry import has_trained
from toolkit.runs.status import RunRecord, current_state, read_status, record_of
from toolkit.threads import Thread

Need = Literal["new", "resume", "retry", "finished", "failed", "running"]
"""What a point needs; the last three are left alone."""

_GENTLE = "hard_stop"
"""Exit reason of a run that its config stops early: it has done what was asked."""
_PAUSE = 0.1


class Options(NamedTuple):
    """How points are started."""

    config: str
    overrides: Sequence[str]
    more: Sequence[str] = ()
    """Other flags of `toolkit train`, as --base."""
    launch: Sequence[str] = ()
    """Flags of `train` and `resume` for processes and engine."""
    processes: int = 1
    jobs: int = 1
    retry: bool = False
    debug: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table of a sweep."""

    name: str
    folder: str
    state: str
    """That of the run; "not started" where there is none."""
    values: dict[str, str]
    step: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    message: str | None = None
    """Why it failed."""


def need_of(point: Point, *, retry: bool) -> Need:
    """What is to be done for a point, by its run folder."""
    status = read_status(point.folder)
    if status is None:
        return "new"
    state = current_state(point.folder, status)
    if state == "running":
        return "running"
    if state == "finished" or (state == "stopped" and status.exit_reason == _GENTLE):
        return "finished"
    if state == "failed" and not retry:
        return "failed"
    if not has_trained(point.folder):
        return "new"
    return "retry" if state == "failed" else "resume"


def outcomes(points: Sequence[Point]) -> list[Outcome]:
    """What became of the points, the least validation loss first, those without one last."""
    found = [_outcome(point, record_of(point.folder)) for point in points]
    return sorted(
        found, key=lambda o: (o.val_loss is None or o.val_loss != o.val_loss, o.val_loss or 0.0)
    )


def _outcome(point: Point, record: RunRecord | None) -> Outcome:
    named = {"name": point.name, "folder": str(point.folder), "values": point.values}
    if record is None:
        return Outcome(**named, state="not started")  # type: ignore[arg-type]
    status = read_status(point.folder)
    fields = ("step", "loss", "val_loss", "best_val_loss", "tokens_per_second", "seconds")
    numbers = {field: getattr(record, field) for field in fields}
    message = status.message if status is not None and record.state != "finished" else None
    return Outcome(**named, **numbers, state=record.state, message=message)  # type: ignore[arg-type]


def run_points(points: Sequence[Point], options: Options, say: Callable[[str], object]) -> int:
    """Train what is not finished, `options.jobs` points at a time; the exit code.

    0: every point is finished. 1: one has failed. 75: stopped on request; the same command goes on.
    A request to stop goes to the runs, which save as they do by themselves.

    Raises:
        ConfigError: this machine has too few GPUs for so many jobs.
    """
    environments = _environments(options)
    sweep = _Sweep(points, options, environments, say)
    with signals.listening(sweep):
        sweep.run()
    states = [need_of(point, retry=False) for point in points]
    if sweep.reason is not None:
        return EXIT_STOPPED
    is_done = all(state in ("finished", "running") for state in states)
    return EXIT_DONE if is_done and not sweep.has_failed else EXIT_FAILED


class _Sweep(signals.Receiver):
    relays = True  # a second request ends the runs at once, and they end this

    def __init__(
        self,
        points: Sequence[Point],
        options: Options,
        environments: Sequence[Mapping[str, str]],
        say: Callable[[str], object],
    ) -> None:
        self.reason: str | None = None
        self.has_failed = False
        self._points, self._options, self._say = points, options, say
        self._free = list(enumerate(environments))
        self._running: dict[int, _Job] = {}

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason
        for job in list(self._running.values()):
            job.send(reason)

    def acknowledge(self, reason: str) -> str | None:
        return f"{reason}: stopping the sweep; the same command goes on with it"

    def run(self) -> None:
        """Start and await everything."""
        try:
            for number, point in enumerate(self._points, 1):
                label = f"[{number}/{len(self._points)}] {point.name}"
                need = need_of(point, retry=self._options.retry)
                if need in ("finished", "failed", "running"):
                    hint = "; --retry tries it again" if need == "failed" else ""
                    self._say(f"{label}: {need}{hint}")
                    continue
                while not self._free and self.reason is None:
                    self._wait()
                if self.reason is not None:
                    break
                self._say(f"{label}: {'started' if need == 'new' else 'resumed'}")
                self._start(point, need)
            while self._running:
                self._wait()
        except BaseException:
            for job in self._running.values():
                job.send("SIGTERM")
            raise

    def _start(self, point: Point, need: Need) -> None:
        options = self._options
        words = ["resume", str(point.folder), *options.launch]
        if need == "new":
            shared = [*options.overrides, *options.more, *options.launch]
            words = ["train", options.config, *shared, *point.flags, "--name", point.name]
        slot, environ = self._free.pop(0)
        prefix = f"[{point.name}] " if options.jobs > 1 else None
        self._running[slot] = _Job(toolkit_command(words, debug=options.debug), environ, prefix)
        if self.reason is not None:  # it came while the process was being made
            self._running[slot].send(self.reason)

    def _wait(self) -> None:
        """For a moment, or for a job to end."""
        time.sleep(_PAUSE)
        for slot, job in list(self._running.items()):
            if (code := job.process.poll()) is not None:
                job.close()
                del self._running[slot]
                self._free = sorted([*self._free, (slot, job.environ)], key=lambda own: own[0])
                if code not in (EXIT_DONE, EXIT_STOPPED) and self.reason is None:
                    self.has_failed = True


class _Job:
    """One run in processes of its own; its lines go to standard error."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], prefix: str | None
    ) -> None:
        self.environ = environ
        self._thread: Thread | None = None
        try:
            # A session of its own: what a terminal sends comes once, through us.
            self.process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=2 if prefix is None else subprocess.PIPE,
                stderr=None if prefix is None else subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"a run cannot be started: {error.strerror}; see `ulimit -u`") from None
        if prefix is not None:
            assert self.process.stdout is not None
            self._thread = Thread(target=_pass_on, args=(self.process.stdout, prefix), daemon=True)
            self._thread.start()

    def send(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            self.process.send_signal(getattr(signal, reason, signal.SIGTERM))

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(5.0)


def _pass_on(lines: IO[bytes], prefix: str) -> None:
    for line in lines:
        sys.stderr.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
        sys.stderr.flush()


def _environments(options: Options) -> list[dict[str, str]]:
    """Of each job: its own GPUs where there are some, its share of the processors otherwise."""
    environ = dict(os.environ)
    if options.jobs == 1:
        return [environ]
    number = options.jobs * options.processes
    if gpus := capacity_here().gpus:
        if number > gpus:
            raise ConfigError(
                f"--jobs {options.jobs} of {options.processes} each need {number} GPUs; this "
                f"machine has {gpus}"
            )
        asked = environ.get("CUDA_VISIBLE_DEVICES")
        own = asked.split(",") if asked else [str(number) for number in range(gpus)]
        each = options.processes
        return [
            environ | {"CUDA_VISIBLE_DEVICES": ",".join(own[n * each : (n + 1) * each])}
            for n in range(options.jobs)
        ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // number))}
    return [threads | environ for _ in range(options.jobs)]


def as_json(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The table for machines."""
    return [msgspec.structs.asdict(outcome) for outcome in found]
