"""One rank is asked to stop; all stop at the same poll, for the same reason."""

import os

import pytest
import torch.distributed as dist

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.train.stopping import FAILURE, StopRequest


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
        return answers, stop.reason
    finally:
        env.close()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({1: "SIGTERM"}, "SIGTERM"),
        ({0: "SIGINT", 1: "SIGTERM"}, "SIGTERM"),
        ({0: "SIGTERM", 1: FAILURE}, FAILURE),
        ({1: "something of a callback's"}, "a request"),
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


def test_one_process_stops_at_once() -> None:
    stop = StopRequest()
    assert not stop.poll(None)
    stop.ask("SIGTERM")
    stop.ask("SIGINT")
    assert stop.poll(None)
    assert stop.reason == "SIGTERM"


def test_a_launcher_that_is_gone_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    stop = StopRequest()
    assert not stop.poll(None)
    monkeypatch.setattr(os, "getppid", lambda: 1_000_000)
    assert stop.poll(None)
    assert stop.reason == "the launcher is gone"
