"""Requests to stop: acknowledged at once, and answered whatever the main thread does."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from toolkit import signals
from toolkit.errors import EXIT_STOPPED
from toolkit.parents import is_launched, launcher_is_gone, orphan_check

ANSWERS = """
import os, sys, time
from toolkit import signals
class Answers(signals.Receiver):
    def ask(self, reason):
        print("asked", reason, flush=True)
        os._exit(3)
"""


def test_before_the_first_step_a_signal_ends_at_once_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    starting = signals.Starting()

    def be_asked() -> None:
        with signals.listening(starting):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    with pytest.raises(signals.Interrupted) as caught:
        be_asked()
    assert caught.value.reason == starting.reason == "SIGINT"
    assert signals.asked() is None  # nobody listens any more
    line = "SIGINT: stopping before the first step; Ctrl-C again to stop now\n"
    assert capsys.readouterr().err == line


def test_the_innermost_receiver_is_asked_and_once_settled_nobody_is_interrupted() -> None:
    asked: list[str] = []

    class Inner(signals.Receiver):
        def ask(self, reason: str) -> None:
            asked.append(reason)

    outer = signals.Starting()
    with signals.listening(outer):
        with signals.listening(Inner()):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (asked, outer.reason, signals.asked()) == (["SIGTERM"], None, "SIGTERM")
        signals.settle()
        os.kill(os.getpid(), signal.SIGTERM)
    assert outer.reason == "SIGTERM"


def test_a_launcher_that_dies_interrupts_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.parents.HAS_LAUNCHER", True)
    monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
    with pytest.raises(signals.Interrupted) as caught, signals.listening(signals.Starting()):
        time.sleep(60)
    assert caught.value.reason == signals.LAUNCHER_GONE


def test_what_a_process_sets_for_its_own_engine_makes_it_no_child_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("toolkit.parents.HAS_LAUNCHER", is_launched({"SLURM_STEP_NUM_TASKS": "1"}))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
    assert not launcher_is_gone()
    for environ in ({"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "4"}, {"PMI_SIZE": "2"}):
        assert is_launched(environ)


def test_a_launcher_that_died_first_is_missed_by_its_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        is_orphan = orphan_check()  # bound, nobody listens: refused
        answers = []
        for _ in range(4):
            answers.append(is_orphan())
            now += 1.0
        assert answers == [False, False, False, True]
        server.listen()
        is_orphan = orphan_check()
        assert not any(is_orphan() for _ in range(10))
        # Somebody else listens there now, and the first process of the machine is no launcher.
        monkeypatch.setattr("toolkit.parents.PARENT", 1)
        monkeypatch.setattr(Path, "read_bytes", lambda _: b"/sbin/init\0")
        assert orphan_check()()
        monkeypatch.setattr(Path, "read_bytes", lambda _: b"/usr/bin/python3\0/usr/bin/torchrun\0")
        is_orphan = orphan_check()
        assert not any(is_orphan() for _ in range(10))


@pytest.mark.parametrize(("reason", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_without_a_run_the_exit_code_is_the_signals(reason: str, code: int) -> None:
    assert signals.exit_code(reason) == code
    assert signals.exit_code(signals.LAUNCHER_GONE) == EXIT_STOPPED


def test_a_stuck_main_thread_without_a_run_ends_with_the_signals_code() -> None:
    code = """
import ctypes, signal
from toolkit import signals
starting = signals.Starting()
starting.patience = 0.3
with signals.listening(starting):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
"""
    with start(code, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # it is asleep by then
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize("stuck", [False, True])
def test_a_second_request_ends_at_once_with_last_words(stuck: bool) -> None:
    code = """
import signal, sys, time
from toolkit import signals
signals.REPEAT_SECONDS = signals._LAST_SECONDS = 0.2
class Busy(signals.Receiver):
    def ask(self, reason):
        print("asked", flush=True)
    def last_words(self, reason):
        if sys.argv[1] == "True":
            time.sleep(60)
        return f"{reason} again"
with signals.listening(Busy()):
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""
    with start(code, str(stuck), stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT
        assert process.stderr.read() == ("" if stuck else "SIGINT again\n")


def test_what_is_held_back_comes_after_the_block() -> None:
    starting = signals.Starting()
    done: list[str] = []

    def hold() -> None:
        with signals.listening(starting):
            with signals.holding_back():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                done.append("whole")
            done.append("not reached")

    with pytest.raises(signals.Interrupted):
        hold()
    assert done == ["whole"]


def test_the_acknowledgement_is_in_the_log_file_and_once_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    from toolkit.distributed.logging import add_log_file, setup_logging

    setup_logging(0)
    file = add_log_file(tmp_path, 0)
    logger = logging.getLogger("toolkit")

    def be_asked() -> None:
        with signals.listening(signals.Starting()):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            finally:
                signals.await_acknowledgement()

    try:
        assert logger.handlers[0] is file  # a request may break off the console's line
        with pytest.raises(signals.Interrupted):
            be_asked()
    finally:
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        file.close()
    line = "SIGINT: stopping before the first step; Ctrl-C again to stop now\n"
    assert capsys.readouterr().err == line
    assert (tmp_path / "rank0.log").read_text().endswith(line)


def test_a_main_thread_stuck_in_native_code_is_ended_after_cleaning_up() -> None:
    """Its signals are blocked, so the other thread gets them and nothing wakes it."""
    code = """
import ctypes, os, signal, sys
from toolkit import signals
def close(reason):
    print("closed", reason, flush=True)
    return 75
starting = signals.Starting(close)
starting.patience = 0.3
with signals.listening(starting):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
"""
    with start(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # it is asleep by then
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
        assert process.stdout.read() == "closed SIGTERM\n"


def test_a_program_that_still_imports_its_parts_leaves_in_one_line() -> None:
    code = """
import os, signal, sys
sys.argv = ["/usr/bin/toolkit", "train"]
import toolkit.cli
print(signal.getsignal(signal.SIGINT) is not signal.default_int_handler, flush=True)
if sys.stdin.readline() == "main\\n":
    toolkit.cli.stop_leaving()
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
else:
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached")
"""
    for word, expected, code_expected in (("main", "True\nTrue\n", 0), ("", "True\n", 130)):
        with start(code, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(f"{word}\n", 60)
        assert (out, process.returncode) == (expected, code_expected)
        assert err == ("" if word else "SIGINT: stopped before anything began\n")


def test_a_closed_terminal_stops_nothing(tmp_path: Path) -> None:
    """SIGHUP from the terminal itself; writing to it fails too."""
    code = (
        ANSWERS
        + """
import fcntl, termios
from toolkit.cli.output import outlive_readers
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
outlive_readers()
with signals.listening(Answers()):
    print("ready", flush=True)
    while signals._lacks_terminal() is False:
        time.sleep(0.01)
    time.sleep(0.3)
    print("nobody reads this", flush=True)
    open(sys.argv[1], "w").write("went on")
"""
    )
    master, slave = pty.openpty()
    with start(code, str(tmp_path / "seen"), stdin=slave, stdout=slave) as process:
        os.close(slave)
        assert b"ready" in os.read(master, 100)
        os.close(master)
        assert process.wait(60) == 0
    assert (tmp_path / "seen").read_text() == "went on"


def test_without_a_terminal_a_sighup_asks() -> None:
    code = ANSWERS + "with signals.listening(Answers()): print('ready', flush=True); time.sleep(60)"
    with start(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 3
        assert process.stdout.read() == "asked SIGHUP\n"


def start(code: str, *words: str, **more: Any) -> subprocess.Popen[str]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | more
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], text=True, start_new_session=True, **streams
    )


def test_workers_are_started_deaf_to_signals_and_stay_so() -> None:
    code = """
import signal, sys
from toolkit import signals
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
signals.ignore_in_worker()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.raise_signal(number)
print(sorted(s.name for s in blocked), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    with signals.starting_workers(), start(code) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)  # before it could do anything about it
        expected = ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"]
        assert process.stdout.read() == f"{expected} set()\n"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
