"""Other processes: the one that started this one, and which of them live. No torch."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from toolkit.threads import Thread

PARENT = os.getppid()
"""Who started this process."""

_LAUNCHER_VARIABLES = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")
_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables of launchers that set no WORLD_SIZE; a shell within a job has them too, for one."""
_OF_ONE_PROCESS = ("TORCHELASTIC_RUN_ID", "TOOLKIT_LAUNCH_FOLDER", "CROSS_RANK")
"""Variables that launchers give to the processes of a run and nothing else."""
_OF_JOBS = ("SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LAUNCHERS = frozenset(
    {"slurmstepd", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "mpispawn"}
    | {"orterun", "orted", "prterun", "prted"}
)
"""Names of the programs that give them."""
_REFUSALS = 4
"""Refused connections to the launcher's store, a second apart, that mean it is dead."""


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether these are the variables of a process that a launcher started."""
    return any(name in environ for name in _LAUNCHER_VARIABLES) or any(
        environ.get(name, "1") != "1" for name in _SIZES
    )


HAS_LAUNCHER = is_launched(os.environ)
"""Decided before this process sets variables itself: the engines of one process want WORLD_SIZE."""


def launcher_is_gone() -> bool:
    """Whether a launcher started this process and has ended. A shell that exits after
    `toolkit train &` is nobody's business."""
    return HAS_LAUNCHER and os.getppid() != PARENT


def is_surely_one_of_many(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process, so that there is a rank 0: its variables may also be
    left in a shell, or be those of a job that the shell runs in."""
    if any(name in environ for name in _OF_ONE_PROCESS):
        return True
    if not any(name in environ for name in _OF_JOBS):
        return False
    import psutil

    with contextlib.suppress(psutil.Error):
        return any(parent.name() in _LAUNCHERS for parent in psutil.Process().parents())
    return False


def is_accelerated() -> bool:
    """Whether `accelerate launch` started this process, as far as one of its parents tells."""
    import psutil

    if "CROSS_RANK" in os.environ:  # over pdsh, from another machine
        return True
    with contextlib.suppress(psutil.Error):
        return any(
            Path(word).name.startswith("accelerate")
            for parent in psutil.Process().parents()
            for word in parent.cmdline()[:4]
        )
    return False


def is_alive(pid: int, started: float | None = None) -> bool:
    """Whether a process of this machine runs: `pid`, which began at `started` (Unix seconds). A
    later one may have the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def end_with_parent(parent: int) -> None:
    """End this process, a worker, once `parent` is gone: a killed process cannot end others."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    Thread(target=watch, name="parent-watch", daemon=True).start()


def orphan_check() -> Callable[[], bool]:
    """For a launcher that ended before this process could look who started it; called every tick.

    The process then belongs to the first of the machine, which is no Python program, or not called
    accelerate. Else a worker of an elastic launcher finds nobody at the address of its launcher's
    store, which was there before it; but another program may have taken that address since.
    """
    environ = os.environ
    is_elastic = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if PARENT == 1 and not _is_first_called(b"python" if is_elastic else b"accelerate"):
        return lambda: is_elastic or "ACCELERATE_MIXED_PRECISION" in environ
    if not is_elastic:
        return lambda: False
    try:
        address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    except (KeyError, ValueError):
        return lambda: False
    refused, next_look = 0, 0.0

    def store_is_gone() -> bool:
        nonlocal refused, next_look
        if time.monotonic() < next_look:
            return False
        next_look = time.monotonic() + 1.0
        try:
            socket.create_connection(address, 2.0).close()
            next_look = float("inf")
        except ConnectionRefusedError:
            refused += 1
        except OSError:
            next_look = float("inf")  # a network that cannot be judged
        return refused >= _REFUSALS

    return store_is_gone


def _is_first_called(name: bytes) -> bool:
    """Whether `name` is in the command line of the machine's first process, or nobody knows."""
    try:
        return name in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return True
