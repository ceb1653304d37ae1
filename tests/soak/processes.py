"""Training processes to be killed: forked from a warm server, or started by `torchrun`.

A start from the warm server costs a tenth of a second instead of the seconds of Python's imports.
What is forked is the command line itself, under a launcher of a few lines
where several ranks are asked for; a share of the runs uses the real launcher.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.e2e._run import environ
from tests.forked import run_to_the_end
from tests.workers import SERVER, free_port


class Family:
    """A launcher and its workers; without a launcher, one process that is both."""

    def __init__(self, words: Sequence[str], *, ranks: int, log: Path, torchrun: bool = False):
        self.ranks = ranks
        self.log = log
        self.torchrun = torchrun
        if torchrun:
            with log.open("ab") as file:
                self._real = subprocess.Popen(
                    ["torchrun", f"--nproc-per-node={ranks}", "-m", "toolkit", *words],
                    env=environ(),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self._launcher = psutil.Process(self._real.pid)
        else:
            target = run_to_the_end if ranks == 1 else _launch
            arguments = (list(words), str(log)) if ranks == 1 else (list(words), str(log), ranks)
            self._forked = SERVER.Process(target=target, args=arguments)
            self._forked.start()
            assert self._forked.pid is not None
            self._launcher = psutil.Process(self._forked.pid)
        self._known: dict[int, psutil.Process] = {self._launcher.pid: self._launcher}

    def workers(self) -> list[psutil.Process]:
        """The training processes that live now."""
        if self.ranks == 1:
            return [self._launcher] if _lives(self._launcher) else []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self._launcher.children():
                self._known[child.pid] = child
        return [p for p in self._known.values() if p.pid != self._launcher.pid and _lives(p)]

    def kill(self, victims: str, *, chosen: int = 0) -> None:
        """SIGKILL for "all" processes, for the "launcher", or for "one" worker."""
        workers = self.workers()
        if victims == "all":
            doomed = [self._launcher, *workers]
        elif victims == "launcher":
            doomed = [self._launcher]
        else:
            doomed = workers[chosen % len(workers) :][:1] if workers else []
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def is_running(self) -> bool:
        return _lives(self._launcher)

    def wait(self, timeout: float) -> int | None:
        """Until nobody of the family lives; the launcher's exit code (negative: a signal)."""
        deadline = time.monotonic() + timeout
        self.workers()
        while any(_lives(process) for process in self._known.values()):
            if time.monotonic() > deadline:
                alive = [p.pid for p in self._known.values() if _lives(p)]
                for pid in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{alive} did not end in {timeout} s:\n{self.output()}")
            time.sleep(0.002)
        if self.torchrun:
            return self._real.wait()
        self._forked.join()
        return self._forked.exitcode

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _launch(words: list[str], log: str, ranks: int) -> None:
    """In the forked process: start the ranks; when one fails, end the others (as torchrun does)."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    workers = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run_to_the_end(words, log)
        workers.add(pid)
    worst = 0
    while workers:
        pid, status = os.wait()
        workers.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not worst:
            worst = 1
            for other in workers:
                os.kill(other, signal.SIGTERM)
            threading.Thread(target=_insist, args=(set(workers),), daemon=True).start()
    os._exit(worst)


def _insist(workers: set[int]) -> None:
    time.sleep(10.0)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
