"""Whose failure ends a run of several ranks. Collectives tell nothing when one of them hangs or is
gone, so ranks leave notes for each other in `metadata/ranks`:

- `rank{R}.json`: where rank R runs; how far it is, once it makes no progress.
- `failure.{attempt}.json`: the first failure of an attempt. What fails after it, on other ranks, is
  its consequence and says so.
- `hang.{attempt}.json`: a watchdog ends the job; the other ranks show their stacks too.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.secrets import mask_secrets
from toolkit.errors import RunError, ToolkitError, TrainingError
from toolkit.parents import is_alive
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.status import read_status
from toolkit.storage.atomic import create_json, write_json_atomic
from toolkit.storage.foreign import read_json

SECONDS_FOR_RANK_0 = 1.0
"""How long another rank with an error waits for rank 0 to end with the same one."""

_SECONDS_FOR_THE_FIRST = 2.0
"""How long a rank that lost another waits for that one's reason."""

_LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL error",
    "NCCL communicator was aborted",
    "remote process exited",
)
"""Words of collectives whose partner is gone."""


class RankNote(msgspec.Struct, kw_only=True):
    """Content of `rank{R}.json`."""

    rank: int
    attempt: int
    host: str
    pid: int
    role: str = ""
    """What the rank has of the model, where that is not all of it."""
    step: int = 0
    phase: str = "starting"
    count: int = 0
    """Heartbeats so far: alike on ranks that are equally far."""
    idle_seconds: float = 0.0
    """Since the last heartbeat."""
    where: str = ""
    """Innermost Python line of the main thread."""
    has_dumped: bool = False
    """Its stacks are in its log, the last thing before it ends."""

    def describe(self) -> str:
        """`rank 1 on node1: step 7, LMEvaluator, at file.py:12 in f`."""
        where = f", at {self.where}" if self.where else ""
        name = name_of(self.rank, self.role)
        return f"{name} on {self.host}: step {self.step}, {self.phase}{where}"


class Failure(msgspec.Struct, kw_only=True):
    """Content of `failure.{attempt}.json`."""

    rank: int
    host: str
    step: int
    message: str


class LostPeerError(TrainingError):
    """This rank fails because another one did."""


class Peers:
    """The ranks of one attempt of a run, as seen by one of them."""

    def __init__(
        self,
        run: RunManager,
        *,
        rank: int,
        world_size: int,
        role_of: Callable[[int], str] = lambda rank: "",
    ) -> None:
        """`role_of` says what a rank has of the model, where that is not all of it."""
        self.run_folder = run.folder
        self.role_of = role_of
        self.rank = rank
        self.world_size = world_size
        self.attempt = run.attempt
        self._folder = run.path(RUN_FILES.ranks)
        self._failure = self._folder / f"failure.{self.attempt}.json"
        self._hang = self._folder / f"hang.{self.attempt}.json"

    def name(self, rank: int) -> str:
        """`rank 3`, and what it has."""
        return name_of(rank, self.role_of(rank))

    def publish(self, **place: Any) -> None:
        """Tell the others where this rank is, in fields of `RankNote`; a folder that cannot be
        written is no reason to fail."""
        host, pid = socket.gethostname(), os.getpid()
        me: dict[str, Any] = {"rank": self.rank, "role": self.role_of(self.rank)}
        note = RankNote(**me, attempt=self.attempt, host=host, pid=pid, **place)
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            write_json_atomic(self._folder / f"rank{self.rank}.json", note, sync=False)

    def notes(self) -> dict[int, RankNote]:
        """What the ranks of this attempt published last."""
        found = {}
        for rank in range(self.world_size):
            with contextlib.suppress(FileNotFoundError, RunError):
                note = read_json(self._folder / f"rank{rank}.json", RunError, RankNote)
                if note.attempt == self.attempt:
                    found[rank] = note
        return found

    def gone(self) -> list[RankNote]:
        """Ranks of this machine whose process ended."""
        here = socket.gethostname()
        return [n for n in self.notes().values() if n.host == here and not is_alive(n.pid)]

    def announce_hang(self) -> None:
        """Have the other ranks that make no progress show their stacks."""
        with contextlib.suppress(OSError):
            create_json(self._hang, {"rank": self.rank})

    @property
    def is_hang_announced(self) -> bool:
        """Whether some rank's watchdog ends the job."""
        return self._hang.exists()

    def report(self, error: BaseException, *, step: int) -> LostPeerError | None:
        """`fail`, then `explain`."""
        self.fail(error, step=step)
        return self.explain(error, step=step)

    def fail(self, error: BaseException, *, step: int) -> None:
        """Note the failure of this rank, if it is the first and not another's consequence."""
        if self.world_size == 1 or isinstance(error, LostPeerError) or is_lost_peer(error):
            return
        message = first_line(error)
        if not isinstance(error, ToolkitError):
            message = f"{type(error).__name__}: {message}"
        message = mask_secrets(message)[:500]
        failure = Failure(rank=self.rank, host=socket.gethostname(), step=step, message=message)
        with contextlib.suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            create_json(self._failure, failure)

    def first_failure(self) -> Failure | None:
        """The first failure of this attempt that is nobody's consequence."""
        with contextlib.suppress(FileNotFoundError, RunError):
            return read_json(self._failure, RunError, Failure)
        return None

    def explain(self, error: BaseException, *, step: int) -> LostPeerError | None:
        """The error to show for one that comes from another rank's end; None: it does not."""
        if self.world_size == 1 or isinstance(error, LostPeerError) or not is_lost_peer(error):
            return None
        failure, gone = self._first_cause()
        logs, shows = self.run_folder / RUN_FILES.logs, self.rank == 0
        if failure is not None:
            cause = (
                f"ended because {self.name(failure.rank)} on {failure.host} failed at step "
                f"{failure.step}: {failure.message}; its traceback is in "
                f"{logs / f'rank{failure.rank}.log'}"
            )
        elif gone:
            roles = {n.rank: [self.role_of(n.rank), f"pid {n.pid} on {n.host}"] for n in gone}
            names = ", ".join(name_of(r, ", ".join(filter(None, own))) for r, own in roles.items())
            shows = self.rank == min(set(range(self.world_size)) - {n.rank for n in gone})
            cause = (
                f"lost {names}, whose process was killed; if it was not you, look for what "
                "ended it in that machine's log (memory?)"
            )
        else:
            cause = (
                f"lost the connection to another rank ({first_line(error)}); the launcher's "
                f"report and {logs} tell what ended it"
            )
        here = f"{self.name(self.rank)} on {socket.gethostname()}, step {step}"
        lost = LostPeerError(f"{here}: {cause}; continue with `toolkit resume {self.run_folder}`")
        lost.only_here = shows and self.rank > 0
        return lost

    def _first_cause(self) -> tuple[Failure | None, list[RankNote]]:
        """Wait a moment for the reason, or for the end of a process of this machine."""
        deadline = time.monotonic() + _SECONDS_FOR_THE_FIRST
        while True:
            gone = self.gone()
            failure = self.first_failure()  # written before its process ends: read after
            if failure is not None or gone or time.monotonic() > deadline:
                return failure, gone
            time.sleep(0.05)


def name_of(rank: int, role: str) -> str:
    """`rank 3 (stage 2 of 4)`; without a role `rank 3`."""
    return f"rank {rank} ({role})" if role else f"rank {rank}"


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error`, or what caused it, comes from a collective whose partner is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if any(words in str(seen) for words in _LOST):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def name_rank(error: BaseException, run: RunManager, rank: int, step: int) -> None:
    """Say whose error it is, where it is not rank 0's or not one of ours."""
    if not isinstance(error, ToolkitError):
        where = f"rank {rank} on {socket.gethostname()} failed at step {step}"
        error.add_note(f"{where}; its log: {run.path(RUN_FILES.logs)}/rank{rank}.log")
    elif rank > 0:
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


def first_line(error: BaseException) -> str:
    """The first line of the message, or the name of the class where there is none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def clear_notes(folder: Path) -> None:
    """Remove the notes of earlier attempts; rank 0 calls it once the run is its own."""
    for path in (folder / RUN_FILES.ranks).glob("*.json"):
        with contextlib.suppress(OSError):
            path.unlink()
