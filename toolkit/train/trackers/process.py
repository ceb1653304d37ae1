"""The process of a sender: started by training, fed through a pipe, ended within bounds.

Training writes one line, what to send; at its end another, how it ended; and closes the pipe. When
training dies, the pipe closes without the second line. Whatever a library does (hang, crash, hold
the interpreter, leave a process behind) happens in a process group of its own, which is killed.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, get_args

import msgspec

import toolkit
from toolkit.runs.files import RUN_FILES
from toolkit.threads import Thread
from toolkit.train.trackers.config import TRACKERS, TrackerConfig
from toolkit.train.trackers.sender import LATER, End, Sender
from toolkit.train.trackers.service import Outcome

log = logging.getLogger(__name__)

_INFO, _WARNING, _END = "info", "warning", "end"
"""First words of the lines that the process says; after the last one it ends as it should."""
_NICE = 15
"""Training goes first where processors are few: it keeps 97% of one that both want."""
_SECONDS_TO_DIE = 3.0
"""Beyond `flush_seconds`, before training kills the process."""
_SECONDS_BETWEEN_LOOKS = 1.0
"""At the parent process."""
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from toolkit.train.trackers.process import main; main()"
)


class Job(msgspec.Struct, frozen=True):
    """What to send."""

    folder: str
    attempt: int
    config: dict[str, Any]
    parent: int
    """Process id of training."""


class SenderProcess:
    """Training's end of the pipe."""

    def __init__(self, config: TrackerConfig, folder: Path, *, attempt: int) -> None:
        self._config = config
        source = str(Path(toolkit.__file__).parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, source, config.field],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Signals of a terminal do not reach it; in the same session, `nice` still counts.
            process_group=0,
            # Not the service of a `wandb` that training itself has opened.
            env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"},
        )
        job = Job(str(folder), attempt, msgspec.to_builtins(config), os.getpid())
        self._write(msgspec.json.encode(job) + b"\n")
        name = f"tracker-{config.field}"
        self._listener = Thread(target=self._listen, name=name, daemon=True)
        self._listener.start()

    def end(self, outcome: Outcome) -> None:
        """Say how training ended, and wait until everything is sent, for a bounded time."""
        self._write(f"{outcome}\n".encode())
        with contextlib.suppress(OSError):
            self._pipe(self._process.stdin).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._config.flush_seconds + _SECONDS_TO_DIE)
        with contextlib.suppress(OSError):  # what a library left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(1.0)

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has died, and said why
            pipe = self._pipe(self._process.stdin)
            pipe.write(data)
            pipe.flush()

    def _listen(self) -> None:
        has_ended = False
        for line in self._pipe(self._process.stdout):
            kind, _, text = line.decode(errors="replace").rstrip().partition(" ")
            has_ended |= kind == _END
            if text:
                log.log(logging.INFO if kind == _INFO else logging.WARNING, "%s", text)
        if not has_ended:
            log.warning("%s: its process was killed or has failed; %s", self._config.title, LATER)

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def main() -> None:
    """The process: sends until training ends, then for `flush_seconds` at most."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # training is asked to stop, and tells us how it did
    os.nice(_NICE)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    field, folder = sys.argv[1], Path(job.folder)
    config: TrackerConfig = msgspec.convert(job.config, TRACKERS[field])
    out = _keep_stdout(folder / RUN_FILES.trackers, field)

    def say(kind: str, text: str) -> None:
        with contextlib.suppress(OSError):
            out.write(f"{kind} {text}\n".encode())
            out.flush()

    end = End()
    sender = Sender(
        folder,
        config,
        attempt=job.attempt,
        warn=lambda text: say(_WARNING, text),
        tell=lambda text: say(_INFO, text),
    )
    for target, name in ((_read_word, "word"), (_watch_parent, "parent")):
        Thread(target=target, args=(end, job.parent), name=name, daemon=True).start()
    bound = (end, sender, config, say)
    Thread(target=_bound, args=bound, name="bound", daemon=True).start()
    if sender.run(end):
        say(_END, "")
    else:
        _say_behind(sender, say)
    _die()


def _read_word(end: End, parent: int) -> None:
    word = sys.stdin.buffer.readline().decode().strip()
    end.come(word if word in get_args(Outcome) else "killed")  # type: ignore[arg-type]


def _watch_parent(end: End, parent: int) -> None:
    """A process that training forked may hold the pipe open."""
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    end.come("killed")


def _bound(end: End, sender: Sender, config: TrackerConfig, say: Any) -> None:
    end.wait(threading.TIMEOUT_MAX)
    time.sleep(config.flush_seconds)
    _say_behind(sender, say)
    _die()


def _say_behind(sender: Sender, say: Any) -> None:
    if not sender.missing_steps:  # no reason to warn
        say(_INFO, sender.behind_message())
    say(_END, sender.behind_message() if sender.missing_steps else "")


def _die() -> None:
    """At once, with whatever the library started; what it holds was delivered, or is in files."""
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


def _keep_stdout(folder: Path, field: str) -> IO[bytes]:
    """The pipe to training; everything that libraries print goes to a log file."""
    folder.mkdir(exist_ok=True)
    out = os.fdopen(os.dup(1), "wb")
    with (folder / f"{field}.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return out
