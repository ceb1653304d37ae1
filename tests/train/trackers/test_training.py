"""Training with a tracker: told everything once, over ranks, stops and resumes; refused early."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_remote_runs import run as run_smoke
from tests.train.trackers._runs import COMET, keep_priority, noted, open_run, write_steps
from tests.workers import WorkerPool
from toolkit.commands.runs import trackers as runs
from toolkit.errors import ConfigError, RunError
from toolkit.metrics.streams import MetricStreams
from toolkit.train.trackers import sender
from toolkit.train.trackers.service import Opened, Service

ON = "--trainer.callbacks.comet={enabled: true, send_interval: 0.05, flush_seconds: 30}"


def run(place: str, environ: dict[str, str], *flags: str) -> tuple[int, str]:
    keep_priority()
    (Path(place) / "comet_ml.py").write_text(COMET)
    before, sys.path[:0] = dict(os.environ), [place]
    os.environ |= {"PYTHONPATH": place, "FAKE_CALLS": f"{place}/calls", "HOME": place} | environ
    try:
        return run_smoke(f"{place}/run", f"{place}/data", ON, *flags)
    finally:
        sys.path.remove(place)
        os.environ.clear()
        os.environ.update(before)


def test_each_step_once_over_ranks_a_stop_and_a_resume(workers: WorkerPool, tmp_path: Path) -> None:
    place, environ = str(tmp_path), {"COMET_API_KEY": "key-of-a-test"}
    off = "--trainer.callbacks.tensorboard.enabled=false"
    stop = "--trainer.hard_stop={value: 7, unit: steps}"
    assert workers.run(2, run, place, environ, off, stop) == [(0, "")] * 2
    calls, tensorboard = tmp_path / "calls", tmp_path / "run" / "tb"
    assert [step for _, step, _ in noted(calls, "row")] == list(range(8))  # evaluated at 0
    assert not any(tensorboard.glob("*"))
    network = "--trainer.callbacks.tensorboard.streams=[network]"
    sample = "--trainer.callbacks.sample_writer={enabled: true, max_new_tokens: 4}"
    assert workers.run(1, run, place, environ, network, sample) == [(0, "")]
    assert [step for _, step, _ in noted(calls, "row")] == list(range(13))
    assert [step for _, step, _ in noted(calls, "text")] == [12]
    assert noted(calls, "config") == [["config", "0"]] * 2
    assert [word for _, word in noted(calls, "outcome")] == ["finished", "finished"]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in files if b"key-of-a-test" in path.read_bytes()]


def test_missing_credentials_end_before_anything_is_made(
    workers: WorkerPool, tmp_path: Path
) -> None:
    [(code, message)] = workers.run(1, run, str(tmp_path), {"COMET_API_KEY": ""})
    assert code == 2
    assert message == (
        "trainer.callbacks.comet: no login for Comet is found here; set COMET_API_KEY, run "
        "`comet login`, or --trainer.callbacks.comet.mode=offline"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Fake(Service):
        def open(self, run_id: str | None) -> Opened:
            sent.append(self.run.folder.as_uri())  # which no relative path has
            return Opened("id")

        def describe(self, facts: object) -> None:
            pass

        def send(self, rows: Any, *, again: bool) -> None:
            sent.extend(row.step for row in rows)

        def finish(self, outcome: str) -> None:
            sent.append(outcome)

    monkeypatch.setattr(sender, "open_service", Fake)
    folder = tmp_path / "runs" / "exp" / "first"
    with open_run(folder) as live, MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
        with pytest.raises(RunError, match="another process is writing"):
            runs.send(str(folder), "mlflow", print)
        live.close("stopped")
    (folder / "metadata" / "config.json").unlink()
    with pytest.raises(ConfigError, match="name one with --tracker"):
        runs.send(str(folder), None, print)
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        runs.send(str(folder), "mlfow", print)
    monkeypatch.chdir(tmp_path)
    assert runs.send("runs/exp/first", "mlflow", print)
    assert sent == [folder.as_uri(), *range(1, 13), "stopped"]
    said: list[str] = []
    assert runs.send("runs/exp/first", "mlflow", said.append)
    assert len(sent) == 14  # nothing was opened
    assert said == [f"MLflow: nothing is missing, by {folder / 'trackers' / 'mlflow.json'}"]
    with open_run(folder, resume=True), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 13, 13)
    (folder / "metadata" / "config.json").unlink()
    assert runs.send("runs/exp/first", "mlflow", said.append)
    assert sent[14:] == [folder.as_uri(), 13, "finished"]


def test_nobody_is_said_to_train_where_nobody_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*arguments: object) -> Service:
        raise OSError("no route")

    monkeypatch.setattr(sender, "open_service", down)
    folder = tmp_path / "runs" / "exp" / "first"
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 2)
    (folder / "metadata" / "config.json").unlink()
    said: list[str] = []
    assert not runs.send(str(folder), "mlflow", said.append)
    assert said == ["MLflow: OSError: no route"]
