"""The mirror of a run: a process beside training that copies the run folder to a URL.

Training writes its folder and knows nothing of the URL. The process reads the folder, like a
tracker's does: it takes neither the interpreter nor, where processors are few, the processor from
training, and nobody waits for it before the end of the run. It also keeps the lease alive.
"""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

import toolkit
from toolkit import signals
from toolkit.checkpoint.retention import Retention
from toolkit.distributed.ranks import LAUNCH_FOLDER
from toolkit.errors import RunError, StorageError
from toolkit.launch.copying import Job
from toolkit.launch.pushing import Pusher, push_all
from toolkit.launch.remote_run import check_not_ahead, take_over
from toolkit.launch.workers import launcher_seconds
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lease import Lease
from toolkit.runs.manager import RunManager
from toolkit.storage.remote import RemoteFolder, Retries
from toolkit.storage.transient import is_transient
from toolkit.threads import Thread, Worker

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0
"""Between two looks at the folder. A look and what it sends may take twice as long again before
metrics are later than `LAG_SECONDS`."""
LAG_SECONDS = 30
PROBE_SECONDS = 60.0
"""A store that does not answer the first questions by then counts as out of reach."""
_RESTART_SECONDS = 10.0
_LONGEST_PAUSE = 300.0
_SECONDS_TO_DIE = 3.0
_TICK_SECONDS = 0.2
_TORCHRUN_SECONDS = 30.0
"""After a signal, by default."""
_SECONDS_TO_SAY = 10.0
"""Before a launcher kills: to close, and to say that something is missing."""
_SECONDS_TO_RELEASE = 5.0
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); from toolkit.launch.copying import main; main()"
)


class Mirror:
    """Training's end, on the rank that writes the run: `open`, `start`, `close`."""

    def __init__(self, url: str, folder: Path, rule: Retention, *, wait_seconds: float) -> None:
        self.url = url
        self._folder, self._rule, self._wait_seconds = folder, rule, wait_seconds
        self._remote = RemoteFolder(url)
        self._lease = Lease(RemoteFolder(url, retries=Retries(2)))
        self._has_lease = False
        self._run: RunManager | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._turn = threading.Lock()
        self._closing = threading.Event()
        self._is_done = False
        self._has_given_up = False
        self._replaced: RunError | None = None
        self._listener = Thread(target=self._keep_process, name="mirror", daemon=True)

    def open(self) -> None:
        """Take the lease, and bring the folder up to date.

        Raises:
            RunError: the store refuses, or another process writes the run.
            StorageError: the store is out of reach.
        """
        probe = Worker("mirror-probe")
        try:
            probe.submit(self._lease.probe).result(PROBE_SECONDS)
            self._lease.acquire()
            self._has_lease = True
        except TimeoutError:
            raise StorageError(f"{self.url}: no answer in {PROBE_SECONDS:.0f} s") from None
        except StorageError as error:
            if error.__cause__ is not None and is_transient(error.__cause__):
                raise
            raise RunError(f"run.mirror: {error}; nothing was started") from error
        finally:
            probe.stop()
        self._listener.start()
        take_over(self.url, self._folder)

    def start(self, run: RunManager) -> None:
        """Begin to copy. The status goes first: another machine must see that there is a newer
        attempt. Raises RunError where another process has taken the run over meanwhile."""
        self._run = run
        if self._replaced is not None:
            raise self._replaced
        try:
            self._remote.write(RUN_FILES.status, run.path(RUN_FILES.status).read_bytes())
        except StorageError as error:
            log.warning("%s; training goes on, and it is tried again", error)
        log.info(
            "mirrored to %s: metrics at most %d s late, and before the checkpoint they lead to; "
            "the run itself is in %s",
            self.url, LAG_SECONDS, run.folder,
        )  # fmt: skip
        self._say("push")

    def close(self, *, within: float = math.inf) -> None:
        """Wait until everything is there, for at most `within` and the configured seconds, and give
        the lease back. Who was asked to stop waits no longer than the launcher does."""
        if self._closing.is_set():
            return
        with self._turn:
            self._closing.set()
            self._say("end")
        started = time.monotonic()
        if self._listener.ident is not None:
            # A run that never began has nothing to send.
            until = started + min(within, self._wait_seconds if self._run else _SECONDS_TO_DIE)
            while self._listener.is_alive() and (left := until - time.monotonic()) > 0:
                if (left := seconds_left(left)) <= 0:
                    break
                self._listener.join(min(left, _TICK_SECONDS))
        self._has_given_up = True
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._is_done:
            log.info("%s: has all of the run", self.url)
        elif self._run is not None and self._replaced is None:
            log.error(
                "%s: lacks the end of this run, after %.0f s (run.mirror_wait); it is whole in %s: "
                "bring it there with `toolkit runs push %s`",
                self.url, time.monotonic() - started, self._folder, self._folder,
            )  # fmt: skip
        if self._has_lease:
            releasing = Worker("mirror-release")
            with contextlib.suppress(StorageError, TimeoutError):
                releasing.submit(self._lease.release).result(_SECONDS_TO_RELEASE)
            releasing.stop()

    def _keep_process(self) -> None:
        """Start the process, listen to it, and start it again where it dies by itself."""
        may_die, pause = True, _RESTART_SECONDS
        while True:
            started = time.monotonic()
            with self._turn:
                process = self._start_process()
                if self._closing.is_set():
                    self._say("end")
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(*line.decode(errors="replace").rstrip().partition(" ")[::2])
            process.wait()
            is_ending = self._closing.is_set()
            if (
                self._is_done
                or self._has_given_up
                or self._replaced
                or (is_ending and not (may_die and self._run))
            ):
                return
            may_die = not is_ending  # perhaps before it heard that this is the end
            text = "%s: the process that copies the run has ended (%s); it is started again"
            log.warning(text, self.url, self._last_error() or f"code {process.returncode}")
            has_worked = time.monotonic() - started > _LONGEST_PAUSE
            pause = _RESTART_SECONDS if has_worked else pause
            self._closing.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if self._has_given_up:
                return

    def _last_error(self) -> str:
        """The last line that the process said as it died."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 1000))
        lines = self._errors.read().decode(errors="replace").split("\n")
        self._errors.truncate(0)
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _start_process(self) -> subprocess.Popen[bytes]:
        source = str(Path(toolkit.__file__).parent.parent)
        with signals.starting_workers():  # the end's signals may come before it ignores them
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                process_group=0,
            )
        job = Job(
            str(self._folder), self.url, self._lease.info, tuple(self._rule), os.getpid(),
            INTERVAL_SECONDS, self._lease.heartbeat_seconds,
        )  # fmt: skip
        self._say(msgspec.json.encode(job).decode())
        if self._run is not None:
            self._say("push")
        return self._process

    def _say(self, text: str) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(f"{text}\n".encode())
                process.stdin.flush()

    def _hear(self, word: str, text: str) -> None:
        if word == "done":
            self._is_done = True
        elif word == "lost":
            self._replaced = RunError(text)
            if self._run is not None:
                self._run.replaced = self._replaced
        else:
            log.log(logging.INFO if word == "info" else logging.WARNING, "%s", text)


def seconds_left(seconds: float, environ: Mapping[str, str] = os.environ) -> float:
    """How much of so many seconds this process has, as it may have been asked to stop: its launcher
    kills it some time after that, and before that it has to say what is missing."""
    asked = signals.seconds_since_asked()
    if asked is None:
        return seconds
    grace = float(launcher_seconds(environ))
    if LAUNCH_FOLDER not in environ and "TORCHELASTIC_RUN_ID" in environ:
        grace = float(environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _TORCHRUN_SECONDS))
    return max(0.0, min(seconds, grace - min(_SECONDS_TO_SAY, grace / 2) - asked))


def push(folder: Path, url: str, rule: Retention, say: Callable[[str], object]) -> None:
    """Bring a run that nobody trains to `url`, at once.

    Raises:
        RunError: another process writes there, or the run went on elsewhere.
        StorageError, TrainingError: the store is out of reach, or refuses.
    """
    remote = RemoteFolder(url)
    lease = Lease(remote)
    lease.probe()
    lease.acquire()
    lost = threading.Event()

    def check() -> None:
        if lost.is_set() or not lease.check():
            raise lease.lost_error()

    try:
        with lease.kept(lost.set, lambda: None):
            check_not_ahead(url, folder)
            pusher = Pusher(folder, remote, rule, check=check)
            pusher.begin()
            push_all(pusher, say=say)
    finally:
        with contextlib.suppress(StorageError):
            lease.release()
