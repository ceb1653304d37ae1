"""The processes that a launcher starts, and what becomes of them."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit import signals
from toolkit.distributed.ranks import LAUNCH_FOLDER, STORE_FD, STORE_FILE, check_launcher_variables
from toolkit.errors import EXIT_STOPPED, ConfigError, TrainingError
from toolkit.launch import workers as module
from toolkit.launch.joining import TOKEN
from toolkit.launch.nodes import Failed
from toolkit.launch.workers import (
    SECONDS_TO_SAVE,
    Workers,
    launch,
    launcher_seconds,
    note_run,
    toolkit_command,
    worker_environments,
)
from toolkit.runs.registry import start_run
from toolkit.runs.status import RunState


def test_the_processes_get_the_command_and_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Recorded(signals.Receiver):
        reason = None

        def __init__(self, command: list[str], environments: list[dict[str, str]], _: None) -> None:
            store = Path(environments[0][STORE_FILE])
            started.append((command, len(environments), stat.S_IMODE(store.parent.stat().st_mode)))
            assert not store.exists()
            folder = os.open(store.parent, os.O_RDONLY)
            with pytest.raises(BlockingIOError):  # as cleaners of /tmp find it
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(folder)

        def wait(self, seconds: float) -> None:
            assert seconds == SECONDS_TO_SAVE

    monkeypatch.setattr(module, "Workers", Recorded)
    assert launch(["x"], 2) == 0
    assert started == [(["x"], 2, 0o700)]


@pytest.mark.parametrize(("spec", "path"), [(None, ["-P"]), ("toolkit.__main__", [])])
def test_the_processes_find_the_modules_of_their_launcher(
    spec: str | None, path: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder comes first after `python -m toolkit` alone. --debug reaches them."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    words = ["train", "my.json", "--processes", "2"]
    expected = [sys.executable, *path, "-m", "toolkit"]
    assert toolkit_command(words, debug=True) == [*expected, *words, "--debug"]
    (tmp_path / "json.py").write_text("raise ImportError('of the user')")
    said = subprocess.run(
        toolkit_command(["--version"]), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ("of the user" in said.stderr) == (spec is not None)
    assert (said.returncode == 0) == (spec is None)


def test_the_time_to_save_can_be_changed() -> None:
    assert launcher_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}) == 900
    with pytest.raises(ConfigError, match="'soon' is no number of seconds"):
        launcher_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "soon"})


def test_the_processes_get_what_a_launcher_gives() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth7", "WORLD_SIZE": "9", "HOME": "/home/me"}
    both = worker_environments(environ | {TOKEN: "s", STORE_FD: "7"}, 2, Path("/tmp/x"))
    for rank, given in enumerate(both):
        check_launcher_variables(given)
        assert (given["RANK"], given["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (given["WORLD_SIZE"], given["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert given["HOME"] == "/home/me"
        assert given["GLOO_SOCKET_IFNAME"] == "eth7"  # whoever asks for it gets it
        assert given[STORE_FILE] == "/tmp/x/store"
        assert not {TOKEN, STORE_FD} & set(given)


def workers_of(code: str, tmp_path: Path) -> Workers:
    """Two processes that run `code`."""
    return Workers(
        python(code, tmp_path), worker_environments(os.environ, 2, tmp_path / "launcher")
    )


def python(code: str, tmp_path: Path) -> list[str]:
    head = f"import os, signal, sys, time; rank = os.environ['RANK']; place = {str(tmp_path)!r}\n"
    return [sys.executable, "-S", "-c", head + code]


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
    failed = workers_of(code, tmp_path).wait(30)
    assert failed == (expected and Failed(None, "", *expected))


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
    workers = workers_of(code, tmp_path)
    assert workers.wait(0.2) == Failed(None, "", 0, 1)
    assert [process.poll() for process in workers._processes] == [1, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("time.sleep(0.3)", None),
        (f"time.sleep(0.3); sys.exit({EXIT_STOPPED})", EXIT_STOPPED),
        ("time.sleep(600)", "lost"),
    ],
)
def test_a_lost_machine_matters_to_those_that_cannot_end_without_it(
    code: str, expected: int | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Failed(1, "node1", None, None)
    meeting: Any = SimpleNamespace(poll=lambda: lost, tell=lambda **_: None, first_rank=0)
    if expected == "lost":
        monkeypatch.setattr(module, "SECONDS_TO_FOLLOW", 0.0)
    workers = workers_of(code, tmp_path)
    workers._meeting = meeting
    failed = workers.wait(30)
    assert failed == lost if expected == "lost" else (failed and failed.code) == expected
    assert all(process.poll() is not None for process in workers._processes)


def when_all_are_there(tmp_path: Path, do: Any) -> None:
    def wait() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        do()

    threading.Thread(target=wait).start()


def test_signals_are_passed_on_and_a_stop_is_the_exit_code(tmp_path: Path) -> None:
    code = f"""
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({EXIT_STOPPED}))
open(place + '/' + rank, 'w')
time.sleep(600)
"""
    workers = workers_of(code, tmp_path)
    with signals.listening(workers):
        when_all_are_there(tmp_path, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        failed = workers.wait(30)
    assert failed is not None
    assert failed.code == EXIT_STOPPED
    assert workers.reason == "SIGUSR1"
    assert [process.poll() for process in workers._processes] == [EXIT_STOPPED] * 2


class Ending:
    """A process that ends with `code` when it has been looked at `looks` times."""

    def __init__(self, looks: int, code: int = EXIT_STOPPED) -> None:
        self.looks = looks
        self.code = code
        self.heard: list[int] = []

    def poll(self) -> int | None:
        self.looks -= 1
        return self.code if self.looks < 0 else None

    def send_signal(self, number: int) -> None:
        if self.looks >= 0:
            self.heard.append(number)


@pytest.mark.parametrize(
    ("request_", "code", "heard"),
    [
        ("SIGUSR1", EXIT_STOPPED, [signal.SIGUSR1]),
        ("SIGUSR1", 1, [signal.SIGUSR1, signal.SIGTERM]),
        (None, EXIT_STOPPED, [signal.SIGTERM]),
    ],
)
def test_who_was_asked_to_stop_is_not_asked_again(
    request_: str | None, code: int, heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second request ends at once who still saves, which is right after a failure alone."""
    monkeypatch.setattr(module, "SECONDS_TO_FOLLOW", 0.0)
    workers = Workers([], [])
    done, saving = Ending(0, code), Ending(8)
    workers._processes = [done, saving]  # type: ignore[list-item]
    if request_ is not None:
        workers.ask(request_)
    assert workers.wait(600) == Failed(None, "", 0, code)
    assert saving.heard == heard


def test_a_signal_while_processes_start_reaches_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(place + '/' + rank, 'w')
time.sleep(600)
"""
    start = Workers.__init__

    def interrupted(self: Workers, *arguments: Any) -> None:
        start(self, *arguments)
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Workers, "__init__", interrupted)
    with signals.listening(signals.Starting()):
        assert launch(python(code, tmp_path), 2) == EXIT_STOPPED


@pytest.mark.parametrize("is_known", [False, True])
def test_a_worker_that_was_killed_is_named(
    is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where to go on, if rank 0 has opened a run."""

    def start(self: Workers, _: object, environments: list[dict[str, str]], __: None) -> None:
        self.reason = None
        if is_known:
            note_run(tmp_path, environments[0])

    monkeypatch.setattr(Workers, "__init__", start)
    monkeypatch.setattr(Workers, "wait", lambda *_: Failed(None, "", 1, -9))
    then = f"go on with `toolkit resume {tmp_path}`" if is_known else "then start again"
    with pytest.raises(TrainingError, match=rf"rank 1 was killed \(SIGKILL\); .*{then}"):
        launch([], 2)


@pytest.mark.parametrize(("state", "code"), [("stopped", EXIT_STOPPED), ("failed", 128 + 15)])
def test_a_stop_that_was_saved_counts_though_a_rank_died_of_the_signal(
    state: RunState, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run("e", "n", resume=False, root=tmp_path)
    run.close(state)

    def start(self: Workers, _: object, environments: list[dict[str, str]], __: None) -> None:
        self.reason = "SIGTERM"
        note_run(run.folder, environments[0])

    monkeypatch.setattr(Workers, "__init__", start)
    monkeypatch.setattr(Workers, "wait", lambda *_: Failed(None, "", 1, -15))
    assert launch([], 2) == code


def test_nobody_notes_a_run_for_another_launcher(tmp_path: Path) -> None:
    note_run(tmp_path, {})
    note_run(tmp_path, {LAUNCH_FOLDER: str(tmp_path / "gone")})
    assert not list(tmp_path.iterdir())
