"""Whose error it is, where a run of several ranks ends: one rank says it, and as its own."""

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from toolkit.errors import RunError, ToolkitError
from toolkit.launch.failures import LostPeerError, Peers, first_line
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.status import read_status

if TYPE_CHECKING:
    from toolkit.distributed.environment import TrainingEnvironment

SECONDS_FOR_RANK_0 = 1.0
"""How long another rank with an error waits for rank 0 to end with the same one."""


def explain(
    error: BaseException, run: RunManager, environment: "TrainingEnvironment", step: int
) -> LostPeerError | None:
    """The error to show where this one is the consequence of another rank's; else the others learn
    that this rank was the first."""
    with contextlib.suppress(RunError):  # this host does not see the run folder
        peers = Peers(run, rank=environment.rank, world_size=environment.world_size)
        peers.fail(error, step=step)
        return peers.explain(error, step=step)
    return None


def name_rank(
    error: BaseException, run: RunManager, environment: "TrainingEnvironment", step: int
) -> None:
    """Say whose error it is, where it is not rank 0's or not one of ours."""
    if not isinstance(error, ToolkitError):
        where = f"rank {environment.rank} on {socket.gethostname()} failed at step {step}"
        error.add_note(f"{where}; its log: {run.path(RUN_FILES.logs)}/rank{environment.rank}.log")
    elif not environment.is_main:
        error.only_here = not _ends_rank_0(error, run)
        if error.only_here and step and f"step {step}" not in str(error):
            error.args = (f"step {step}: {error}",)


def _ends_rank_0(error: ToolkitError, run: RunManager) -> bool:
    """Whether rank 0 leaves the run with the same error; it is given a moment to say so."""
    deadline = time.monotonic() + SECONDS_FOR_RANK_0
    while time.monotonic() < deadline:
        status = read_status(run.folder)
        if status is not None and status.state == "failed":
            return status.message == first_line(error)
        time.sleep(0.05)
    return False
