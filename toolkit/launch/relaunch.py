"""`toolkit resume` (or `verify`) of a run of several processes: this one becomes their launcher.

The processes find each other through a file in a private folder, and talk over the loopback
interface. So nothing of a run on one machine can be reached from another one, nor by another user:
`torchrun` listens on all addresses, and loads pickles that anybody may send it.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from toolkit import signals
from toolkit.distributed.ranks import STORE_FILE, loopback_interface
from toolkit.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, RunError, TrainingError
from toolkit.runs.status import read_status

log = logging.getLogger(__name__)

SECONDS_TO_SAVE = 300
"""How long workers have after a signal until they are killed; torchrun gives them 30."""

SECONDS_TO_FOLLOW = 60.0
"""How long the others have to end by themselves when one of them was stopped on request."""


def relaunch(
    folder: Path,
    arguments: Sequence[str],
    processes: int,
    *,
    verb: str = "resume",
    debug: bool = False,
) -> int:
    """`toolkit VERB folder arguments...` on `processes` processes of this machine; the exit code.

    Raises:
        RunError: they cannot be started.
        TrainingError: a signal killed a worker.
    """
    log.info("relaunching with %d processes", processes)
    command = [sys.executable, "-m", "toolkit", verb, str(folder), *arguments]
    if debug:
        command.append("--debug")
    seconds = launcher_seconds(os.environ)
    with _private_folder() as place:
        workers = Workers(command, processes, place / "store")
        with signals.listening(workers):
            failed = workers.wait(seconds)
    if failed is None:
        return EXIT_DONE
    rank, code = failed
    if code >= 0:
        return code
    if workers.reason is not None:
        status = read_status(folder)
        is_stopped = verb == "resume" and status is not None and status.state == "stopped"
        return EXIT_STOPPED if is_stopped else 128 - code
    raise TrainingError(
        f"rank {rank} was killed ({_signal_name(-code)}); if it was not you, look for what ended "
        f"it in the system's log (memory?), then go on with `toolkit {verb} {folder}`"
    )


class Workers(signals.Receiver):
    """The processes of one run on this machine, which find each other through the file `store`.
    Signals are passed on to them."""

    relays = True  # the workers end at once, and this process with them

    def __init__(self, command: Sequence[str], number: int, store: Path) -> None:
        self.reason: str | None = None
        """The first request to stop."""
        self._asked_at: float | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        environ = worker_environment(os.environ, number, store)
        try:
            for rank in range(number):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of their own: what a terminal sends comes once, through us.
                process = subprocess.Popen(
                    command,
                    env=environ | own,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._processes.append(process)
        except OSError as error:
            self._end(signal.SIGKILL)
            raise RunError(
                f"{number} processes cannot be started: {error.strerror}; see `ulimit -u`"
            ) from None

    def ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self._asked_at = reason, time.monotonic()
        self._end(getattr(signal, reason, signal.SIGTERM))

    def wait(self, seconds: float) -> tuple[int, int] | None:
        """Wait for all; the first that ended with another code than 0, as (rank, code).

        Once one has failed the others are asked to end, and killed after `seconds`; the same after
        a signal.
        """
        first: tuple[int, int] | None = None
        end_at = kill_at = float("inf")
        try:
            while any(process.poll() is None for process in self._processes):
                now = time.monotonic()
                if first is None and (first := self._failed()) is not None:
                    end_at = now + (SECONDS_TO_FOLLOW if first[1] == EXIT_STOPPED else 0.0)
                if self._asked_at is not None:
                    kill_at = min(kill_at, self._asked_at + seconds)
                if now >= end_at:
                    end_at, kill_at = float("inf"), min(kill_at, now + seconds)
                    self._end(signal.SIGTERM)
                if now >= kill_at:
                    self._end(signal.SIGKILL)
                time.sleep(0.05)
        finally:
            self._end(signal.SIGKILL)
        return first or self._failed()

    def _failed(self) -> tuple[int, int] | None:
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code not in (None, EXIT_DONE):
                return rank, code
        return None

    def _end(self, number: int) -> None:
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.send_signal(number)


def worker_environment(environ: Mapping[str, str], number: int, store: Path) -> dict[str, str]:
    """The variables of `number` processes of this machine, without the two that differ."""
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
        # Some libraries want them; nobody listens there.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        STORE_FILE: str(store),
    }
    defaults = {
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "GLOO_SOCKET_IFNAME": loopback_interface(),
        "NCCL_SOCKET_IFNAME": loopback_interface(),
    }
    return {**defaults, **environ, **shared}


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
    with place as name:
        yield Path(name)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
