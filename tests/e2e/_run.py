"""Starting, watching and ending real processes, and reading what they leave behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tests.forked import Forked
from toolkit.checkpoint.folder import saved_steps

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_LAUNCHER = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "TORCHELASTIC_")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environ() -> dict[str, str]:
    """A user's environment: no launcher, the installed commands on the path, one thread, no GPU."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHER) and name not in _RANKS
    }
    return clean | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TOOLKIT_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


class Result:
    """Exit code and output (both streams, in order) of a process that ended."""

    def __init__(self, code: int, output: str) -> None:
        self.code = code
        self.output = output

    @property
    def errors(self) -> list[str]:
        """The lines that start with `error: `."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def run(*command: str | Path, cwd: Path, timeout: float = 120) -> Result:
    """Run a command to its end."""
    process = Process(command, cwd=cwd)
    return process.wait(timeout)


class Process:
    """A process under way, its output in a file. `toolkit` is forked from a warm one."""

    started: ClassVar[list["Process"]] = []
    """All of them; a fixture ends what a failed test left running (or frozen)."""

    def __init__(self, command: Sequence[str | Path], *, cwd: Path) -> None:
        self._output = cwd.absolute() / f".output-{time.time_ns()}"
        if cwd == ROOT:
            self._output = Path(os.environ.get("TMPDIR", "/tmp")) / self._output.name
        words = [str(word) for word in command]
        self._popen: Any
        if words[0] == "toolkit":
            self._popen = Forked(words[1:], cwd=cwd, env=environ(), output=self._output)
            Process.started.append(self)
            return
        with self._output.open("wb") as file:
            self._popen = subprocess.Popen(
                words,
                cwd=cwd,
                env=environ(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        Process.started.append(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def wait(self, timeout: float = 120) -> Result:
        try:
            code = self._popen.wait(timeout)
        except (subprocess.TimeoutExpired, TimeoutError):
            output = self.output
            self.kill()
            raise AssertionError(f"no end after {timeout} s:\n{output}") from None
        result = Result(code, self.output)
        self._output.unlink()
        return result

    def wait_until(self, condition: Callable[[], bool], timeout: float = 90) -> None:
        """Poll `condition` while the process lives."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self._popen.poll() is not None or time.monotonic() > deadline:
                output = self.output
                self.kill()
                raise AssertionError(f"ended, or waited in vain for {timeout} s:\n{output}")
            time.sleep(0.002)

    @staticmethod
    def wait_for(condition: Callable[[], bool], timeout: float) -> None:
        """Poll `condition`, whether the process lives or not."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {timeout} s"
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """A signal to this process alone."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL for this process and all below it, as if the power went."""
        family = [psutil.Process(self._popen.pid)] if self._popen.poll() is None else []
        if family:
            family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        self._popen.wait(10)


def kill_while_saving(process: Process, checkpoints: Path, *, after: int) -> int:
    """SIGKILL a single process while a checkpoint later than step `after` is being written.

    It is frozen when the temporary folder shows up: were it committed meanwhile, the next one is
    taken. Returns the step of the unfinished checkpoint.
    """

    def unfinished() -> list[int]:
        found = checkpoints.glob("step*.tmp")
        steps = [int(path.name.removeprefix("step").removesuffix(".tmp")) for path in found]
        return [step for step in steps if step > after]

    while True:
        process.wait_until(lambda: bool(unfinished()))
        process.send(signal.SIGSTOP)
        time.sleep(0.05)
        if steps := unfinished():
            process.kill()
            return steps[0]
        process.send(signal.SIGCONT)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; every line must be whole."""
    text = path.read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in read_lines(run_folder / "metrics" / "train.jsonl")]


def committed(run_folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    return saved_steps(run_folder / "checkpoints")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
