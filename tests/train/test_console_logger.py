"""Progress that cannot be shown is no reason to stop."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.train.callbacks.config import ConsoleLoggerConfig
from toolkit.train.callbacks.console_logger import ConsoleLogger

RECORD = {"step": 1, "time": 1.0, "loss": 2.0, "lr": 0.1}


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), SystemExit(1)]
)
def test_a_console_that_is_gone_is_one_warning(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone:
        is_terminal = False
        tries = 0

        @property
        def file(self) -> Any:
            Gone.tries += 1
            raise error

    logger: Any = ConsoleLogger(ConsoleLoggerConfig())
    logger.state = SimpleNamespace(is_main=True, step=0, stop_step=9)
    logger._console = Gone()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            logger.on_metrics("train", [RECORD])
    logger.close()
    assert Gone.tries == 1
    assert caplog.text.count("progress is no longer shown") == 1


def test_any_evaluation_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger: Any = ConsoleLogger(ConsoleLoggerConfig())
    logger.state = SimpleNamespace(is_main=True, step=0, stop_step=9)
    logger._console = SimpleNamespace(is_terminal=False, file=sys.stdout)
    ours = {"step": 2, "tokens": 8, "time": 1.0, "name": "val", "loss": 1.0, "ppl": 2.718}
    own = {"step": 2, "tokens": 8, "time": 1.0, "name": "answers", "accuracy": 0.5, "asked": 4}
    logger.on_metrics("eval", [ours, own])
    assert capsys.readouterr().out == (
        "eval at step 2: val loss 1.0000, ppl 2.72\neval at step 2: answers accuracy 0.5000\n"
    )


def test_the_first_step_does_not_count_for_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger: Any = ConsoleLogger(ConsoleLoggerConfig(interval=1))
    logger.state = SimpleNamespace(is_main=True, step=0, stop_step=9)
    logger._console = SimpleNamespace(is_terminal=False, file=sys.stdout)
    logger.pre_train()
    for step, time in ((1, 100.0), (2, 101.0)):
        logger.on_metrics("train", [RECORD | {"step": step, "time": time, "skipped": False}])
    first, second = capsys.readouterr().out.splitlines()
    assert "ETA" not in first
    assert second.endswith("ETA 0:07")
