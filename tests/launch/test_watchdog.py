"""A job that stands still is ended, and the rank it waits for is named."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.launch.failures import Peers, RankNote
from toolkit.launch.watchdog import Heartbeat, Watchdog, explain_hang
from toolkit.runs.manager import RunManager


def note(
    rank: int, count: int, step: int, phase: str, where: str = "gloo.py:1 in wait"
) -> RankNote:
    return RankNote(
        rank=rank, attempt=1, host=f"node{rank}", pid=1, step=step, phase=phase, count=count,
        where=where, has_dumped=True,
    )  # fmt: skip


TRAINING, DATA = "forward and backward", "waiting for data"


@pytest.mark.parametrize(
    ("notes", "world_size", "expected"),
    [
        (
            [note(0, 9, 8, TRAINING), note(1, 8, 8, DATA, "disk.py:7 in read")],
            2,
            "rank 1 on node1: step 8, waiting for data, at disk.py:7 in read; the others wait at "
            "step 8, forward and backward",
        ),
        (
            [note(0, 9, 8, TRAINING), note(2, 9, 8, TRAINING)],
            3,
            "rank gives no sign of life, dead or frozen: 1; the others wait at step 8, "
            "forward and backward",
        ),
        (
            [note(rank, 9, 8, TRAINING) for rank in range(2)],
            2,
            "a collective hangs, all ranks wait in it: rank 0 on node0: step 8, forward and "
            "backward, at gloo.py:1 in wait",
        ),
        (
            [*(note(rank, 9, 8, TRAINING) for rank in range(2)), note(2, 9, 8, TRAINING, "x.py:3")],
            3,
            "rank 2 on node2: step 8, forward and backward, at x.py:3; rank 0 on node0: step 8, "
            "forward and backward, at gloo.py:1 in wait",
        ),
        (
            [note(0, 3, 2, "LMEvaluator", "eval.py:5 in f")],
            1,
            "training stands still: rank 0 on node0: step 2, LMEvaluator, at eval.py:5 in f",
        ),
    ],
)
def test_the_rank_that_others_wait_for_is_named(
    notes: list[RankNote], world_size: int, expected: str
) -> None:
    assert explain_hang({n.rank: n for n in notes}, world_size) == expected


def test_a_stage_that_others_wait_for_is_named() -> None:
    def role_of(rank: int) -> str:
        return f"stage {rank + 1} of 2"

    waiting = note(0, 3, 8, "forward and backward", "x.py:3 in f")
    verdict = explain_hang({0: waiting}, 2, role_of)
    assert verdict.startswith("rank gives no sign of life, dead or frozen: 1 (stage 2 of 2); the ")


class Rank:
    """A watchdog that notes instead of leaving."""

    def __init__(self, run: RunManager, rank: int, world_size: int, **more: object) -> None:
        self.heart = Heartbeat()
        self.left: list[int] = []
        self.told: list[str] = []
        self.dog = Watchdog(
            self.heart,
            Peers(run, rank=rank, world_size=world_size),
            timeout=0.4,
            on_hang=self.told.append,
            leave=self.left.append,
            **more,  # type: ignore[arg-type]
        )
        self.dog.start()


@pytest.fixture
def run(tmp_path: Path) -> RunManager:
    (tmp_path / "metadata").mkdir()
    return RunManager(tmp_path, experiment="a", name="b")


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_all_ranks_show_their_stacks_and_one_tells(
    run: RunManager, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = [Rank(run, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.heart.beat("forward and backward", 7)
    ranks[0].heart.beat("optimizer step", 7)
    wait_until(lambda: all(rank.left for rank in ranks))
    for rank in ranks:
        rank.dog.stop()
    assert [rank.left for rank in ranks] == [[1], [1]]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ": step 7, forward and backward, at " in line
    assert line.startswith("error: rank 1 on ")
    assert f"`toolkit resume {run.folder}`" in line
    assert (ranks[0].told, ranks[1].told) == ([line.removeprefix("error: ")], [])
    for number in range(2):
        text = (run.folder / "logs" / f"rank{number}.log").read_text()
        assert f"rank {number} made no progress" in text
        assert "most recent call first" in text
        assert "test_all_ranks_show_their_stacks" in text


def test_beats_keep_it_quiet_and_slow_phases_have_longer(run: RunManager) -> None:
    rank = Rank(run, 0, 1)
    for _ in range(20):
        rank.heart.beat("forward and backward", 1)
        time.sleep(0.05)
    rank.heart.beat("Checkpointer", 1, is_slow=True)
    time.sleep(0.7)
    assert rank.left == []
    wait_until(lambda: bool(rank.left))
    rank.dog.stop()


def test_time_asleep_does_not_count(run: RunManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was stopped and goes on after an hour."""
    jumps = threading.Event()
    monotonic = time.monotonic
    monkeypatch.setattr(
        "toolkit.launch.watchdog.time.monotonic",
        lambda: monotonic() + (3600.0 if jumps.is_set() else 0.0),
    )
    rank = Rank(run, 0, 1)
    rank.heart.beat("forward and backward", 1)
    time.sleep(0.1)
    jumps.set()
    time.sleep(0.15)
    assert rank.left == []
    rank.heart.beat("forward and backward", 2)
    time.sleep(0.1)
    rank.dog.stop()
    assert rank.left == []


def test_an_orphan_waits_a_minute_at_most(run: RunManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.launch.watchdog.ORPHAN_SECONDS", 0.05)
    heart = Heartbeat()
    heart.beat("forward and backward", 1)
    peers = Peers(run, rank=0, world_size=1)
    dog = Watchdog(heart, peers, timeout=1000.0, has_lost_launcher=lambda: True)
    assert dog._limit() == 0.05
    heart.beat("Checkpointer", 1, is_slow=True)
    assert dog._limit() == pytest.approx(0.15)
    dog.stop()
