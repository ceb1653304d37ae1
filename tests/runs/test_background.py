"""Work of a run that nobody waits for longer than asked."""

import logging
import threading

import pytest

from toolkit.runs.background import Background


def test_jobs_run_in_order_and_a_later_one_replaces_a_waiting_one() -> None:
    background, done, go = Background("test"), [], threading.Event()
    background.submit(lambda: go.wait(30) and None)
    for number in range(3):
        background.submit(lambda number=number: done.append(number), key="status")
    background.submit(lambda: done.append("other"))
    go.set()
    assert background.close(30)
    assert done == [2, "other"]
    background.submit(lambda: done.append("too late"))
    assert background.wait(30)
    assert done == [2, "other"]


def test_closing_does_not_wait_for_what_does_not_end() -> None:
    background, go = Background("test"), threading.Event()
    background.submit(lambda: go.wait(60) and None)
    assert not background.close(0.05)
    go.set()


def test_an_error_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    background = Background("test")
    with caplog.at_level(logging.WARNING):
        background.submit(lambda: int("x") and None)
        assert background.close(30)
    assert "invalid literal" in caplog.text
