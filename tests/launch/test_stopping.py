"""One rank is asked to stop; all stop at the same poll, for the same reason."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit import signals
from toolkit.launch.stopping import (
    FAILURE,
    FINISH,
    STOP_FILE,
    WALL_TIME,
    StopRequest,
    WallTime,
    attempt_started,
    stop_request_of,
)
from toolkit.signals import ASKING, TERMINATING
from toolkit.train.config import TrainerConfig


def polls(asked: dict[int, str]) -> tuple[list[bool], str | None]:
    """Five polls; `asked` gives what a rank wants before the third."""
    env = open_environment(module_config("ddp"))
    try:
        stop = StopRequest()
        answers = []
        for number in range(5):
            if number == 2 and dist.get_rank() in asked:
                stop.ask(asked[dist.get_rank()])
            answers.append(stop.poll(env.cpu_group))
        env.barrier()  # a collective of the same group after the votes
        return answers, FINISH if stop.is_complete and stop.reason is None else stop.reason
    finally:
        env.close()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({1: "SIGTERM"}, "SIGTERM"),
        ({0: "SIGINT", 1: "SIGTERM"}, "SIGTERM"),
        ({0: "SIGTERM", 1: FAILURE}, FAILURE),
        ({1: "something of a callback's"}, "a request"),
        ({0: FINISH, 1: "SIGTERM"}, "SIGTERM"),
    ],
)
def test_all_ranks_stop_one_poll_later_for_one_reason(
    workers: WorkerPool, asked: dict[int, str], reason: str
) -> None:
    results = workers.run(2, polls, asked)
    assert [answers for answers, _ in results] == [[False, False, False, True, True]] * 2
    assert results[0][1] == reason


def test_nobody_asked_nobody_stops(workers: WorkerPool) -> None:
    assert workers.run(2, polls, {}) == [([False] * 5, None)] * 2
    assert workers.run(2, polls, {1: FINISH}) == [([False] * 5, FINISH)] * 2


def test_one_process_stops_at_once() -> None:
    stop = StopRequest()
    assert not stop.poll(None)
    stop.ask("SIGTERM")
    stop.ask("SIGINT")
    assert stop.poll(None)
    assert stop.reason == "SIGTERM"


def test_the_end_that_a_callback_asks_for_hides_no_stop() -> None:
    stop = StopRequest()
    stop.ask(FINISH)
    stop.ask("SIGTERM")
    assert stop.poll(None)
    assert (stop.reason, stop.is_complete) == ("SIGTERM", False)
    stop = StopRequest()
    stop.ask(FINISH)
    assert not stop.poll(None)  # what comes after the last step asks too, and goes on
    assert (stop.reason, stop.is_complete) == (None, True)
    stop.ask("SIGTERM")
    assert stop.poll(None)
    assert stop.reason == "SIGTERM"


def test_a_launcher_that_is_gone_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.parents.HAS_LAUNCHER", True)
    stop = StopRequest()
    assert not stop.poll(None)
    monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
    assert stop.poll(None)
    assert stop.reason == "the launcher is gone"


@pytest.fixture
def handlers() -> Iterator[None]:
    """A failed test must not leave its handlers behind."""
    numbers = (*TERMINATING, *ASKING)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*TERMINATING, *ASKING])
@pytest.mark.usefixtures("handlers")
def test_signals_ask_by_their_names(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored, and that is respected
    stop = StopRequest()
    with signals.listening(stop):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher repeats a terminal's
    assert stop.reason == number.name


@pytest.mark.usefixtures("handlers")
def test_signals_sent_ahead_of_time_never_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1, and SIGTERM minutes later: the save under way gets the scheduler's grace period."""
    stop = StopRequest()
    with signals.listening(stop):
        for minute, number in enumerate((signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM)):
            monkeypatch.setattr(time, "monotonic", lambda minute=minute: 60.0 * minute)
            os.kill(os.getpid(), number)
    assert stop.reason == "SIGUSR1"


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_ignored_stays_so() -> None:
    """nohup"""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with signals.listening(stop):
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.reason is None


def test_a_stop_file_asks_and_goes_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequest(stop_file=tmp_path / "stop")
    assert not stop.poll(None)
    (tmp_path / "stop").touch()
    now += 0.5
    assert not stop.poll(None)  # looked for once a second
    now += 0.6
    assert stop.poll(None)
    assert stop.reason == STOP_FILE
    assert (tmp_path / "stop").exists()  # until the checkpoint is committed
    stop.done()
    assert not (tmp_path / "stop").exists()


def test_the_time_limit_leaves_room_for_the_longest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 1000.0 + now)
    stop = StopRequest(wall_time=WallTime(1000.0, started=900.0))  # 100 s are gone already

    def after(seconds: float) -> bool:
        nonlocal now
        now += seconds
        return stop.poll(None)

    assert not after(0.0)
    assert not after(300.0)  # the first step compiles
    assert not after(100.0)
    assert after(320.0)  # at 720 of 900 s; the next step may take as long
    assert stop._wall_time is not None
    assert stop._wall_time.margin == 2 * 320.0
    assert stop.reason == WALL_TIME


def test_a_margin_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert not WallTime(100.0, 5.0, started=906.0).is_up()
    assert WallTime(100.0, 5.0, started=904.0).is_up()
    assert WallTime(100.0, started=950.0).is_up()  # at least 60 s


def test_the_attempt_begins_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.parents.HAS_LAUNCHER", False)
    monkeypatch.setenv("WORLD_SIZE", "1")  # as the engines of one process want it
    assert attempt_started() == psutil.Process().create_time()
    monkeypatch.setattr("toolkit.parents.HAS_LAUNCHER", True)
    assert attempt_started() == psutil.Process(os.getppid()).create_time()


def test_lengths_of_time_are_checked_with_the_config() -> None:
    with pytest.raises(ValueError, match="max_wall_time: 'soon' is no length of time"):
        TrainerConfig(max_wall_time="soon")
    stop = stop_request_of(
        Path("runs/a"), is_main=True, max_wall_time="2h", stop_file=TrainerConfig().stop_file
    )
    assert stop._wall_time is not None
    assert stop._stop_file == Path("runs/a/stop")
    other = stop_request_of(Path("runs/a"), is_main=False, stop_file="stop")
    assert (other._stop_file, other._wall_time) == (None, None)
