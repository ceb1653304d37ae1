"""`toolkit train --processes N`, and a `resume` or `verify` of several processes: this process
becomes their launcher.

On one machine the processes find each other through a file in a private folder, and talk over the
loopback interface. So nothing of such a run can be reached from another machine, nor by another
user: `torchrun` listens on all addresses, and loads pickles that anybody may send it. A run on
several machines listens on one network interface of each (`nodes.py`).
"""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from toolkit import signals
from toolkit.distributed.ranks import LAUNCH_FOLDER, STORE_FD, STORE_FILE, loopback_interface
from toolkit.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, RunError, TrainingError
from toolkit.launch.joining import TOKEN, meet
from toolkit.launch.messages import Common
from toolkit.launch.nodes import Failed, Meeting, Nodes
from toolkit.runs.status import read_status
from toolkit.storage.atomic import write_atomic

log = logging.getLogger(__name__)

SECONDS_TO_SAVE = 300
"""How long workers have after a signal until they are killed; torchrun gives them 30."""

SECONDS_TO_FOLLOW = 60.0
"""How long the others have to end by themselves when one of them was stopped on request, or when a
machine is lost."""

_SECONDS_TO_EXPLAIN = 5.0
"""How long workers have to notice a failure on another machine, and to say so."""

_SECONDS_WITHOUT_PEERS = 30
"""How long workers have after a signal when a machine is lost: they hang in collectives."""

_NOT_PASSED_ON = (TOKEN, STORE_FD, STORE_FILE)

_RUN_NOTE = "run"
"""File of the private folder in which rank 0 notes the run folder."""


def toolkit_command(words: Sequence[str], *, debug: bool = False) -> list[str]:
    """`toolkit WORDS` under this Python, as a worker of this process is started. It finds the
    modules that this process finds: those of the current folder first only after `python -m`."""
    is_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    path = [] if is_module and not sys.flags.safe_path else ["-P"]
    return [sys.executable, *path, "-m", "toolkit", *words, *(["--debug"] if debug else [])]


def launch(
    command: Sequence[str],
    processes: int,
    *,
    verb: str = "train",
    folder: Path | None = None,
    nodes: Nodes | None = None,
    common: Common | None = None,
) -> int:
    """Run `command` as `processes` processes of this machine; returns the exit code of the first
    that fails, on any machine.

    Args:
        verb: what `toolkit` does in them.
        folder: the run folder; default: rank 0 says it (`note_run`).
        nodes: the machines of the run; default: this one alone.
        common: what has to be the same on all machines.

    Raises:
        ConfigError: the machines do not start the same.
        RunError: the processes cannot be started.
        TrainingError: a signal killed a worker; a machine did not come, or is lost.
    """
    seconds = launcher_seconds(os.environ)
    with _private_folder() as place, contextlib.ExitStack() as stack:
        meeting = None
        if nodes is not None:
            meeting = stack.enter_context(meet(nodes, processes, common or Common()))
        environments = worker_environments(os.environ, processes, place, meeting)
        with signals.holding_back():
            workers = Workers(command, environments, meeting)
            stack.enter_context(signals.listening(workers))
        if meeting is not None and meeting.store is not None:
            meeting.store.close()  # it is rank 0's
        failed = workers.wait(seconds)
        folder = folder or _noted_run(place)
    if failed is None:
        return EXIT_DONE
    if failed.code is not None and failed.code >= 0:
        if failed.node is not None:
            log.info("ended because %s", failed)
        return failed.code
    if workers.reason is not None and failed.code is not None:
        status = None if folder is None or verb == "verify" else read_status(folder)
        is_stopped = status is not None and status.state == "stopped"
        return EXIT_STOPPED if is_stopped else 128 - failed.code
    then = f"toolkit {'resume' if verb == 'train' else verb} {folder}"
    hint = f"go on with `{then}`" if folder is not None else "start again"
    if failed.code is None:
        raise TrainingError(f"{failed}; once it can be reached, {hint}")
    raise TrainingError(
        f"{failed} ({_signal_name(-failed.code)}); if it was not you, look for what ended it in "
        f"the system's log (memory?), then {hint}"
    )


class Workers(signals.Receiver):
    """The processes of one run on this machine, one for each of `environments`, by local rank.
    Signals are passed on to them. What they write goes to `output`; default: where this process
    writes."""

    relays = True  # the workers end at once, and this process with them

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        meeting: Meeting | None = None,
        *,
        output: IO[bytes] | None = None,
    ) -> None:
        self.reason: str | None = None
        """The first request to stop."""
        self._meeting = meeting
        self._asked_at: float | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for environ in environments:
                # A session of their own: what a terminal sends comes once, through us.
                process = subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    pass_fds=[int(environ[STORE_FD])] if STORE_FD in environ else (),
                )
                self._processes.append(process)
        except OSError as error:
            self._end(signal.SIGKILL)
            raise RunError(
                f"{len(environments)} processes cannot be started: {error.strerror}; see "
                "`ulimit -u`"
            ) from None

    def ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self._asked_at = reason, time.monotonic()
        self._end(getattr(signal, reason, signal.SIGTERM))

    def wait(self, seconds: float) -> Failed | None:
        """Wait for all; the first end with another code than 0, here or on another machine.

        Once one has failed the others are asked to end, and killed after `seconds`; the same after
        a signal.
        """
        first: Failed | None = None
        end_at = kill_at = float("inf")
        try:
            while any(process.poll() is None for process in self._processes):
                now = time.monotonic()
                if first is None and (first := self._failed()) is not None:
                    end_at = now + _seconds_to_follow(first)
                if self._asked_at is not None:
                    kill_at = min(kill_at, self._asked_at + seconds)
                if now >= end_at:
                    if first is not None and first.code is None:
                        seconds = min(seconds, _SECONDS_WITHOUT_PEERS)
                    end_at, kill_at = float("inf"), min(kill_at, now + seconds)
                    # A second one ends at once who still saves; where a rank failed, that is right.
                    if self._asked_at is None or not _is_stop(first):
                        self._end(signal.SIGTERM)
                if now >= kill_at:
                    self._end(signal.SIGKILL)
                time.sleep(0.05)
            first = first or self._failed()
            if first is not None and first.code is None:
                # What was lost does not matter where all ended by themselves.
                first = self._ended_here(first)
            if first is None and self._meeting is not None:
                self._meeting.tell(rank=None, code=EXIT_DONE)
        finally:
            self._end(signal.SIGKILL)
        return first

    def _failed(self) -> Failed | None:
        here = self._failed_here()
        if self._meeting is None:
            return here
        if here is not None:
            self._meeting.tell(rank=here.rank, code=here.code)
            return here
        return self._meeting.poll()

    def _ended_here(self, lost: Failed) -> Failed | None:
        """How this machine's processes ended, after another machine was `lost`."""
        here = self._failed_here()
        return lost if here is not None and (here.code or 0) < 0 else here

    def _failed_here(self) -> Failed | None:
        before = self._meeting.first_rank if self._meeting is not None else 0
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code not in (None, EXIT_DONE):
                return Failed(node=None, host="", rank=before + rank, code=code)
        return None

    def _end(self, number: int) -> None:
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.send_signal(number)


def _is_stop(end: Failed | None) -> bool:
    """Not a failure of a process: the others end in good order, as far as they can."""
    return end is not None and end.code in (EXIT_STOPPED, None)


def _seconds_to_follow(end: Failed) -> float:
    """How long the workers here have to end by themselves."""
    if _is_stop(end):
        return SECONDS_TO_FOLLOW
    return 0.0 if end.node is None else _SECONDS_TO_EXPLAIN


def worker_environments(
    environ: Mapping[str, str], processes: int, place: Path, meeting: Meeting | None = None
) -> list[dict[str, str]]:
    """The variables of each of this machine's processes; `place` is their launcher's folder."""
    shared: dict[str, str] = {
        "LOCAL_WORLD_SIZE": str(processes),
        LAUNCH_FOLDER: str(place),
    }
    if meeting is None:
        first, interface = 0, loopback_interface()
        shared |= {
            "WORLD_SIZE": str(processes),
            "GROUP_RANK": "0",
            # Some libraries want them; nobody listens there.
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            STORE_FILE: str(place / "store"),
        }
    else:
        first, interface = meeting.first_rank, meeting.interface
        shared |= meeting.variables
    defaults = {
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    kept = {name: value for name, value in environ.items() if name not in _NOT_PASSED_ON}
    own: list[dict[str, Any]] = [
        {"RANK": str(first + rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
    ]
    if meeting is not None and meeting.store is not None:
        own[0][STORE_FD] = str(meeting.store.fileno())
    return [{**defaults, **kept, **shared, **mine} for mine in own]


def note_run(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Rank 0 tells its launcher, if that is `launch`, which run folder it writes."""
    if LAUNCH_FOLDER in environ:
        with contextlib.suppress(OSError):
            write_atomic(Path(environ[LAUNCH_FOLDER]) / _RUN_NOTE, os.fsencode(folder), sync=False)


def _noted_run(place: Path) -> Path | None:
    try:
        return Path(os.fsdecode((place / _RUN_NOTE).read_bytes()))
    except OSError:
        return None


def launcher_seconds(environ: Mapping[str, str]) -> int:
    """`SECONDS_TO_SAVE`, or what the variable that torchrun reads says instead."""
    text = environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if not text.isdecimal():
        raise ConfigError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT: {text!r} is no number of seconds")
    return int(text)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """One that only this user can read, gone afterwards."""
    try:
        place = tempfile.TemporaryDirectory(prefix="toolkit-", ignore_cleanup_errors=True)
    except OSError as error:
        raise RunError(
            f"{tempfile.gettempdir()}: {error.strerror}; name another folder for temporary files "
            "in TMPDIR"
        ) from None
    with place as name, contextlib.ExitStack() as stack:
        # systemd-tmpfiles, which removes what nobody used for days, passes over what is locked.
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield Path(name)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
