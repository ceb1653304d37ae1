"""The processes that a resumed run of several starts, and what becomes of them."""

import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from toolkit import signals
from toolkit.distributed.ranks import STORE_FILE, check_launcher_variables
from toolkit.errors import EXIT_STOPPED, ConfigError, TrainingError
from toolkit.launch import relaunch as module
from toolkit.launch.relaunch import (
    SECONDS_TO_SAVE,
    Workers,
    launcher_seconds,
    relaunch,
    worker_environment,
)


@pytest.mark.parametrize("debug", [False, True])
def test_flags_and_debug_reach_the_processes(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Recorded(signals.Receiver):
        reason = None

        def __init__(self, command: list[str], number: int, store: Path) -> None:
            started.append((command, number, stat.S_IMODE(store.parent.stat().st_mode)))
            assert not store.exists()

        def wait(self, seconds: float) -> None:
            assert seconds == SECONDS_TO_SAVE

    monkeypatch.setattr(module, "Workers", Recorded)
    assert relaunch(tmp_path, ["--seed=3"], 2, debug=debug) == 0
    expected = ["-m", "toolkit", "resume", str(tmp_path), "--seed=3"]
    command = [sys.executable, *expected, *(["--debug"] if debug else [])]
    assert started == [(command, 2, 0o700)]


def test_the_time_to_save_can_be_changed() -> None:
    assert launcher_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}) == 900
    with pytest.raises(ConfigError, match="'soon' is no number of seconds"):
        launcher_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"})


def test_the_processes_get_what_a_launcher_gives() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth7", "WORLD_SIZE": "9", "HOME": "/home/me"}
    given = worker_environment(environ, 2, Path("/tmp/x/store"))
    check_launcher_variables({**given, "RANK": "1", "LOCAL_RANK": "1"})
    assert (given["WORLD_SIZE"], given["LOCAL_WORLD_SIZE"], given["HOME"]) == ("2", "2", "/home/me")
    assert given["GLOO_SOCKET_IFNAME"] == "eth7"  # whoever asks for it gets it
    assert given[STORE_FILE] == "/tmp/x/store"


def python(code: str, tmp_path: Path) -> list[str]:
    head = f"import os, signal, sys, time; rank = os.environ['RANK']; place = {str(tmp_path)!r}\n"
    return [sys.executable, "-c", head + code]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(0)", None),
        ("sys.exit(0 if rank == '0' else 2)", (1, 2)),
        # The other one would run for ever: it is asked to end, and is.
        ("sys.exit(2) if rank == '0' else time.sleep(600)", (0, 2)),
        ("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(600)", (1, -9)),
    ],
)
def test_the_first_that_fails_ends_the_others(
    code: str, expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    assert Workers(python(code, tmp_path), 2, tmp_path / "store").wait(30) == expected


def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    code = """
if rank == '1':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(place + '/deaf', 'w')
    time.sleep(600)
while not os.path.exists(place + '/deaf'):
    time.sleep(0.01)
sys.exit(1)
"""
    workers = Workers(python(code, tmp_path), 2, tmp_path / "store")
    assert workers.wait(0.2) == (0, 1)
    assert [process.poll() for process in workers._processes] == [1, -signal.SIGKILL]


def test_signals_are_passed_on_and_a_stop_is_the_exit_code(tmp_path: Path) -> None:
    code = f"""
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({EXIT_STOPPED}))
open(place + '/' + rank, 'w')
time.sleep(600)
"""
    workers = Workers(python(code, tmp_path), 2, tmp_path / "store")

    def ask() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask).start()
    with signals.listening(workers):
        assert workers.wait(30) in ((0, EXIT_STOPPED), (1, EXIT_STOPPED))  # both are asked
    assert workers.reason == "SIGUSR1"
    assert [process.poll() for process in workers._processes] == [EXIT_STOPPED] * 2


def test_a_worker_that_was_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "wait", lambda *_: (1, -9))
    monkeypatch.setattr(Workers, "__init__", lambda self, *_: setattr(self, "reason", None))
    with pytest.raises(TrainingError, match=r"rank 1 was killed \(SIGKILL\)"):
        relaunch(tmp_path, [], 2)
