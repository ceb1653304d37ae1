"""Requests to end this process, from its first import on: signals, and a launcher that is gone.

Whoever can answer enters `listening(receiver)`; requests go to the innermost receiver. Python runs
a signal handler only when the main thread is between two of its own instructions, and a compile, a
rendezvous or a collective is one long instruction. So a thread reads the signals too: it
acknowledges the first one at once, notices the end of the launcher, and ends a process whose main
thread cannot answer.

No torch here: this is the first module that the command line imports.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from toolkit.errors import EXIT_STOPPED
from toolkit.parents import launcher_is_gone, orphan_check
from toolkit.threads import Thread

log = logging.getLogger(__name__)

TERMINATING = (signal.SIGTERM, signal.SIGINT)
ASKING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send ahead of time; never kills."""

REPEAT_SECONDS = 2.0
"""Launchers repeat a terminal's signal: only later is a second SIGTERM or SIGINT "now"."""
LAUNCHER_GONE = "the launcher is gone"

ONLY_IN_FILES = {"is_only_in_files": True}
"""Of a log record: the console has it already."""

_TICK_SECONDS = 0.5
_STUCK_SECONDS = 5.0
"""How long a main thread that must leave may stay in native code."""
_LAST_SECONDS = 2.0
"""How long the last words of a process that must end now may take."""


class Interrupted(KeyboardInterrupt):
    """The main thread must leave: this process was asked to stop. `reason`: by what."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def exit_code(reason: str) -> int:
    """Of a process that was asked to stop before it had anything to continue."""
    number = getattr(signal, reason, None)
    return EXIT_STOPPED if number is None else 128 + int(number)


class Receiver:
    """Answers requests."""

    patience: float | None = None
    """Seconds from a request until `give_up`; None: never."""
    relays = False
    """A second SIGTERM or SIGINT is asked for too, and does not end this process."""

    def ask(self, reason: str) -> None:
        """A request: a signal's name (in the main thread), or `LAUNCHER_GONE` (in any)."""
        raise NotImplementedError

    def acknowledge(self, reason: str) -> str | None:
        """What to tell the user at once; None: nothing."""
        return None

    def give_up(self, reason: str) -> int:
        """The main thread did not leave: clean up, and return the exit code."""
        return exit_code(reason)

    def last_words(self, reason: str) -> str | None:
        """A second SIGTERM or SIGINT ends this process now, whatever its main thread does: note it
        where others look, and return what to tell the user. In another thread, for a moment."""
        return None


class Starting(Receiver):
    """Before the first step nothing has to be finished: the main thread leaves by `Interrupted`.
    `close` is called with the reason where it is stuck, and returns the exit code; the user is told
    `doing`."""

    patience: float | None = _STUCK_SECONDS

    def __init__(
        self,
        close: Callable[[str], int] = exit_code,
        *,
        doing: str = "stopping before the first step",
    ) -> None:
        self.reason: str | None = None
        self._doing = doing
        self._close = close
        self._has_raised = False

    def ask(self, reason: str) -> None:
        """Raises Interrupted in the main thread, once."""
        self.reason = self.reason or reason
        if _is_main_thread() and not self._has_raised:
            self._has_raised = True
            raise Interrupted(self.reason)

    def settle(self) -> None:
        """Training begins, or an error is being reported: nothing is raised any more."""
        self._has_raised = True
        self.patience = None

    def acknowledge(self, reason: str) -> str | None:
        if self._has_raised and self.reason is None:
            return None
        return f"{reason}: {self._doing}{again(reason)}"

    def give_up(self, reason: str) -> int:
        return self._close(reason)

    def last_words(self, reason: str) -> str | None:
        self._close(reason)
        return f"{reason} again: stopped now"


def again(reason: str) -> str:
    """How to stop at once, as the end of a line."""
    if reason == "SIGINT":
        return "; Ctrl-C again to stop now"
    return "; a second one stops now" if reason == "SIGTERM" else ""


def asked() -> str | None:
    """Why this process was asked to stop; None: it was not, or nobody listens."""
    return _listener.reason if _listener is not None else None


def seconds_since_asked() -> float | None:
    """Since the first request to stop; None: there was none, or nobody listens."""
    if _listener is None or _listener.asked_at is None:
        return None
    return time.monotonic() - _listener.asked_at


@contextlib.contextmanager
def listening(receiver: Receiver) -> Iterator[None]:
    """Requests go to `receiver` inside the block. In another thread than the main one nothing
    happens. What is ignored, as SIGHUP under nohup, stays so."""
    global _listener
    if not _is_main_thread():
        yield
    elif _listener is not None:
        with _listener.receiving(receiver):
            yield
    else:
        _listener = _Listener()
        try:
            with _listener.receiving(receiver), _listener.installed():
                yield
        finally:
            _listener = None


@contextlib.contextmanager
def holding_back() -> Iterator[None]:
    """A request does not break off what the main thread does inside the block: it comes after."""
    listener = _listener if _is_main_thread() else None
    if listener is None:
        yield
        return
    listener.holds += 1
    try:
        yield
    finally:
        listener.holds -= 1
        reason = listener.held_back
        if reason is not None and not listener.holds and listener.receivers:
            listener.held_back = None
            listener.receivers[-1].ask(reason)


def await_acknowledgement() -> None:
    """Let the line that acknowledges a request come before what is said from here on."""
    if _listener is not None and _listener.reason is not None:
        _listener.has_acknowledged.wait(1.0)


def settle() -> None:
    """Whoever waits with `Starting` is past the start: a request is only noted from here on."""
    for receiver in _listener.receivers if _listener is not None else ():
        if isinstance(receiver, Starting):
            receiver.settle()


def ignore_in_worker() -> None:
    """For worker processes, in their main thread: they end with their parent, not by the signals
    that ask it to stop. Programs that they start can still be ended by SIGTERM."""
    for number in (*ASKING, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*TERMINATING, *ASKING))


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes started inside the block do not see the signals until `ignore_in_worker`: they
    would die of one that comes before it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*TERMINATING, *ASKING))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Listener:
    """The handlers and the thread, while anybody listens."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.asked_at: float | None = None
        self.receivers: list[Receiver] = []
        self._terminated_at: float | None = None
        self._has_spoken = False
        self._had_terminal = not _lacks_terminal()
        self._is_stopping = threading.Event()
        self.has_acknowledged = threading.Event()
        self._forced: int | None = None
        self.holds = 0
        self.held_back: str | None = None
        # Of the thread alone:
        self._seen_at: float | None = None
        self._give_up_at: float | None = None

    @contextlib.contextmanager
    def receiving(self, receiver: Receiver) -> Iterator[None]:
        self.receivers.append(receiver)
        try:
            yield
        finally:
            self.receivers.remove(receiver)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            there.setblocking(False)
            old_fd = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
            before = {
                number: signal.signal(number, self._on_signal)
                for number in (*TERMINATING, *ASKING)
                if number in TERMINATING or signal.getsignal(number) != signal.SIG_IGN
            }
            thread = Thread(target=self._watch, args=(here,), name="signals", daemon=True)
            thread.start()
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(old_fd)
                self._is_stopping.set()
                with contextlib.suppress(OSError):
                    there.send(b"\0")
                thread.join(_STUCK_SECONDS)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_closed_terminal(number):
            return
        receiver = self.receivers[-1]
        if number in TERMINATING:
            now = time.monotonic()
            if self._terminated_at is None:
                self._terminated_at = now
            elif now - self._terminated_at > REPEAT_SECONDS and not receiver.relays:
                signal.signal(number, signal.SIG_DFL)  # the thread sends it once more
                self._forced = number
                return
        reason = signal.Signals(number).name
        self._note(reason)
        if self.holds:
            self.held_back = reason
            return
        receiver.ask(reason)

    def _note(self, reason: str) -> None:
        if self.reason is None:
            self.reason, self.asked_at = reason, time.monotonic()

    def _watch(self, reader: socket.socket) -> None:
        is_orphan = orphan_check()
        is_lost = False
        while True:
            ready, _, _ = select.select([reader], [], [], _TICK_SECONDS)
            if ready:
                with contextlib.suppress(OSError):
                    for number in reader.recv(64):
                        if number in (*TERMINATING, *ASKING):
                            self._see(number)
            if self._is_stopping.is_set():
                return
            if not is_lost and (launcher_is_gone() or is_orphan()):
                is_lost = True
                self._lose_launcher()
            self._enforce()

    def _see(self, number: int) -> None:
        if self._is_closed_terminal(number):
            text = "SIGHUP: the terminal is closed; going on without it (to stop: kill %d)"
            log.warning(text, os.getpid())
            return
        reason = signal.Signals(number).name
        self._note(reason)  # a main thread in native code was not asked yet
        self._acknowledge(reason)
        if number not in TERMINATING:
            return
        now = time.monotonic()
        if self._seen_at is None:
            self._seen_at = now
        elif now - self._seen_at > REPEAT_SECONDS and not any(
            r.relays for r in self.receivers[-1:]
        ):
            self._forced = number

    def _lose_launcher(self) -> None:
        self._note(LAUNCHER_GONE)
        self._acknowledge(LAUNCHER_GONE)
        if not self.receivers:
            return
        receiver = self.receivers[-1]
        receiver.ask(LAUNCHER_GONE)
        if receiver.patience is not None:  # into the main thread, which must leave
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _acknowledge(self, reason: str) -> None:
        if self._has_spoken or not self.receivers:
            return
        self._has_spoken = True
        receiver = self.receivers[-1]
        line = receiver.acknowledge(reason)
        if receiver.patience is not None:
            self._give_up_at = time.monotonic() + receiver.patience
        if line is not None:
            _say(line)
        self.has_acknowledged.set()

    def _enforce(self) -> None:
        if self._forced is not None:
            self._end_now(self._forced)
        if self._give_up_at is None or time.monotonic() < self._give_up_at or not self.receivers:
            return
        receiver = self.receivers[-1]
        if receiver.patience is None:  # training has begun meanwhile, or is over
            self._give_up_at = None
            return
        code = exit_code(reason := self.reason or "SIGTERM")
        with contextlib.suppress(BaseException):
            code = receiver.give_up(reason)
        os._exit(code)

    def _end_now(self, number: int) -> None:
        """End this process as the signal would, once it has said so; a disk or a lock that does not
        answer only delays it."""
        reason = signal.Signals(number).name

        def speak() -> None:
            if self.receivers and (line := self.receivers[-1].last_words(reason)) is not None:
                _say(line)

        thread = Thread(target=speak, name="last-words", daemon=True)
        thread.start()
        thread.join(_LAST_SECONDS)
        # The main thread has made it deadly by now, if it can.
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        os._exit(128 + number)

    def _is_closed_terminal(self, number: int) -> bool:
        """Whether a SIGHUP tells that the terminal went, which is no reason to stop."""
        return number == signal.SIGHUP and self._had_terminal and _lacks_terminal()


_listener: _Listener | None = None


def _say(line: str) -> None:
    """A line for the user, from rank 0, and for the log files of all ranks. Not through the
    console's handler, whose lock a main thread that writes to a frozen terminal holds."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
    log.info("%s", line, extra=ONLY_IN_FILES)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _lacks_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return True
    return False
