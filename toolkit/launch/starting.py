"""The start of a run: a stop before the first step, and workers that their launcher starts again
(`torchrun --max-restarts`, or a node that joins or leaves).

Such workers continue the run that their predecessors wrote, whatever the command says about its
name: a run records in its status which launcher started it, and a worker whose launcher is the same
one is a successor.
"""

import calendar
import contextlib
import logging
import os
import socket
import time
from pathlib import Path

import msgspec
import psutil

from toolkit import signals
from toolkit.errors import EXIT_FAILED, EXIT_STOPPED, RunError
from toolkit.launch.failures import Peers
from toolkit.launch.mirror import Mirror
from toolkit.runs.config import RunConfig
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import resolve_run_folder
from toolkit.runs.status import STOP_FILE, WALL_TIME, RunStatus, read_status

log = logging.getLogger(__name__)

_CLOCK_SECONDS = 60.0
"""Clocks of different machines may differ by this much."""

_STAYS_STOPPED = ("SIGHUP", "SIGUSR1", "SIGUSR2", WALL_TIME, STOP_FILE)
"""Requests that mean the run, not the worker: being started again does not undo them. SIGTERM is
also what launchers send to workers that they are about to start again."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """The launcher that starts this worker, and would start its successor."""

    run_id: str
    """`--rdzv-id`; "none" or empty where the launcher was given none."""
    host: str
    pid: int
    started: float
    """Unix seconds."""


def current_launch() -> Launch | None:
    """Who started this process; None without a launcher that starts workers again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent is not None:
            return Launch(
                run_id=os.environ["TORCHELASTIC_RUN_ID"],
                host=socket.gethostname(),
                pid=parent.pid,
                started=parent.create_time(),
            )
    return None


def find_predecessor(config: RunConfig, launch: Launch | None) -> Path | None:
    """The folder of the run that workers of the same launch began; None: this is the first."""
    if launch is None:
        return None
    if config.save_folder is not None or config.name is not None:
        candidates = [resolve_run_folder(config, "")]
    else:
        # Names are times (UTC), so all older runs can be told without opening them.
        oldest = time.strftime("%Y%m%d-%H%M%S", time.gmtime(launch.started - _CLOCK_SECONDS))
        root = resolve_run_folder(config, "name").parent
        names = sorted(os.listdir(root), reverse=True) if root.is_dir() else []
        candidates = [root / name for name in names if name[:1].isdigit() and name >= oldest]
    for folder in candidates:
        status = read_status(folder)
        if status is not None and is_successor(status, launch):
            return folder
    return None


def is_successor(status: RunStatus, launch: Launch) -> bool:
    """Whether a worker of `launch` follows the one that wrote `status`."""
    try:
        recorded = msgspec.convert(status.other.get("launch"), Launch)
    except msgspec.ValidationError:
        return False
    if recorded.run_id != launch.run_id:
        return False
    if recorded.host == launch.host:
        return recorded.pid == launch.pid and abs(recorded.started - launch.started) < 2.0
    # Rank 0 moved to another machine: its launcher is another process of the same launch.
    since = calendar.timegm(time.strptime(status.started, "%Y-%m-%dT%H:%M:%SZ"))
    return launch.run_id not in ("", "none") and since >= launch.started - _CLOCK_SECONDS


def stays_stopped(folder: Path) -> bool:
    """Whether the run in `folder`, of this launch, was stopped for good and not to be restarted."""
    status = read_status(folder)
    return status is not None and status.state == "stopped" and status.exit_reason in _STAYS_STOPPED


class RunStart(signals.Starting):
    """The part of a run before its first step, while it is asked to stop."""

    def __init__(self) -> None:
        super().__init__(close=self.stop)
        self.run: RunManager | None = None
        self.rank = 0
        self.log_file: logging.Handler | None = None
        self.mirror: Mirror | None = None

    def close(self) -> None:
        """Everything has been written, and the last lines said."""
        if self.mirror is not None:
            self.mirror.close()
        if self.log_file is not None:
            logging.getLogger("toolkit").removeHandler(self.log_file)
            self.log_file.close()

    def stop(self, reason: str) -> int:
        """Note the stop in the run, if there is one by now; the exit code."""
        signals.await_acknowledgement()
        run = self.run
        if run is None:
            return signals.exit_code(reason) if self.rank == 0 else EXIT_STOPPED
        failure = None  # on another rank: then that is why this one is being ended
        with contextlib.suppress(RunError):
            failure = Peers(run, rank=self.rank, world_size=0).first_failure()
        if failure is not None:
            message = f"rank {failure.rank} on {failure.host}: {failure.message}"
            run.close("failed", message=message, exit_reason="error")
            return EXIT_FAILED
        run.close("stopped", message=f"{reason} before the first step", exit_reason=reason)
        if run.is_main:
            log.info("nothing is lost; continue with: toolkit resume %s", run.folder)
        return EXIT_STOPPED
