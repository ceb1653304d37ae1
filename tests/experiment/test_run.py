"""What one process of a run concludes about the others, and about the run it continues."""

import time
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import TrainingError
from toolkit.experiment import run as experiment
from toolkit.runs.manager import RunManager


@pytest.mark.parametrize(
    ("state", "message", "expected"),
    [
        ("failed", "step 7: disk full", True),
        ("failed", "step 7: something else", False),
        ("running", None, False),
    ],
)
def test_an_error_is_rank_0s_too_when_it_failed_with_the_same_words(
    state: Any, message: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(experiment, "SECONDS_FOR_RANK_0", 0.05)
    (tmp_path / "metadata").mkdir()
    run = RunManager(tmp_path, experiment="a", name="b")
    run.set_status(state, message=message)
    error = TrainingError("step 7: disk full\nmore")
    assert experiment._ends_rank_0(error, run) is expected
