"""Four services against small fakes of their libraries: the documented calls."""

import json
import sys
from types import SimpleNamespace

import pytest

from toolkit.train.trackers.config import TRACKERS
from toolkit.train.trackers.rows import Row
from toolkit.train.trackers.service import TrackedRun, flat
from toolkit.train.trackers.services import open_service

ROWS = [
    Row(1, 5.0, {"train/loss": 2.0, "network/grad_norm/total": 1.0}, []),
    Row(2, 6.0, {"train/loss": 1.0}, [{"prompt": "a", "text": "b"}]),
]
FACTS = {"model": {"d_model": 8, "rope": None}, "tags": ["x"], "git": {"commit": "abc"}}
FLAT = {"model.d_model": "8", "model.rope": "null", "tags": '["x"]', "git.commit": "abc"}


class Recorder:
    """An object that takes every call and writes it down."""

    def __init__(self, calls, path="", **answers):
        self.__dict__.update(_calls=calls, _path=path, _answers=answers)

    def __getattr__(self, name):
        if name in self._answers:
            return self._answers[name]
        return Recorder(self._calls, f"{self._path}.{name}".lstrip("."))

    def __setattr__(self, name, value):
        self._calls.append((f"{self._path}.{name} =", (value,), {}))

    def __setitem__(self, name, value):
        self._calls.append((f"{self._path}[]", (name, value), {}))

    def __call__(self, *arguments, **options):
        self._calls.append((self._path, arguments, options))
        answers = self._answers.get("answers", {})
        return answers.get(self._path, Recorder(self._calls, self._path))


@pytest.fixture
def calls():
    return []


def use(monkeypatch, module, **contents):
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**contents))


def track(tmp_path, field, *, run_id=None, outcome="finished", **settings):
    run = TrackedRun(tmp_path / "runs" / "exp" / "first", "first", "exp", "0123456789abcdef" * 2)
    config = TRACKERS[field](enabled=True, tags=("t",), notes="why", **settings)
    service = open_service(config, run, lambda text: None)
    opened = service.open(run_id)
    service.describe(FACTS)
    service.send(ROWS, again=False)
    service.finish(outcome)
    return opened


def named(calls, name):
    return [(arguments, options) for path, arguments, options in calls if path == name]


def test_comet(tmp_path, calls, monkeypatch):
    experiment = Recorder(calls, "run", url="https://comet/x", get_key=lambda: "key")
    start = Recorder(calls, "start", answers={"start": experiment})
    use(monkeypatch, "comet_ml", start=start, ExperimentConfig=dict)
    opened = track(tmp_path, "comet", entity="us")
    assert (opened.run_id, opened.where) == ("key", "https://comet/x")
    [(_, options)] = named(calls, "start")
    assert options["experiment_key"] == "0123456789abcdef" * 2
    assert (options["mode"], options["online"]) == ("get_or_create", True)
    assert (options["workspace"], options["project_name"]) == ("us", "exp")
    assert (options["experiment_config"]["name"], options["experiment_config"]["tags"]) == (
        "first", ["t"],
    )  # fmt: skip
    assert named(calls, "run.log_parameters") == [((FLAT,), {})]
    assert named(calls, "run.log_metrics") == [((row.values,), {"step": row.step}) for row in ROWS]
    assert named(calls, "run.log_text") == [(("ab",), {"step": 2})]
    assert [path for path, _, _ in calls[-2:]] == ["run.log_other", "run.end"]
    track(tmp_path, "comet", run_id="key", mode="offline")
    assert named(calls, "start")[-1][1]["experiment_key"] == "key"
    assert named(calls, "start")[-1][1]["online"] is False


def test_clearml(tmp_path, calls, monkeypatch):
    logger = Recorder(calls, "logger")
    task = Recorder(
        calls, "task", id="id", get_logger=lambda: logger, get_output_log_web_page=lambda: "url"
    )
    use(monkeypatch, "clearml", Task=Recorder(calls, "", init=Recorder(
        calls, "init", answers={"init": task})))  # fmt: skip
    assert track(tmp_path, "clearml").run_id == "id"
    [(_, options)] = named(calls, "init")
    assert (options["project_name"], options["task_name"]) == ("exp", "first")
    assert (options["reuse_last_task_id"], options["continue_last_task"]) == (False, False)
    assert named(calls, "logger.report_scalar") == [
        (("train", "loss"), {"value": 2.0, "iteration": 1}),
        (("network", "grad_norm/total"), {"value": 1.0, "iteration": 1}),
        (("train", "loss"), {"value": 1.0, "iteration": 2}),
    ]
    assert named(calls, "task.connect_configuration") == [((FACTS,), {"name": "run"})]
    assert calls[-1][0] == "task.close"
    track(tmp_path, "clearml", run_id="id", outcome="failed")
    _, options = named(calls, "init")[-1]
    # Steps are absolute: no offset of the last iteration there.
    assert options["reuse_last_task_id"] == "id"
    assert options["continue_last_task"] == 0
    assert options["continue_last_task"] is not False
    assert [path for path, _, _ in calls[-2:]] == ["task.mark_failed", "task.close"]


def test_swanlab(tmp_path, calls, monkeypatch):
    run = Recorder(calls, "run")
    use(
        monkeypatch, "swanlab", init=Recorder(calls, "init", answers={"init": run}),
        config=Recorder(calls, "config"), Text=lambda text, caption: (caption, text),
        finish=Recorder(calls, "finish"),
    )  # fmt: skip
    opened = track(tmp_path, "swanlab", group="g")
    [(_, options)] = named(calls, "init")
    assert (options["id"], options["resume"]) == (opened.run_id, "allow")
    assert len(opened.run_id) == 21
    assert (options["mode"], options["group"], options["tags"]) == ("cloud", "g", ["t"])
    assert named(calls, "run.log") == [
        ((ROWS[0].values,), {"step": 1}),
        ((ROWS[1].values | {"samples": [("a", "b")]},), {"step": 2}),
    ]
    assert named(calls, "config.update") == [((FLAT,), {})]
    track(tmp_path, "swanlab", run_id=opened.run_id, mode="offline")
    assert "resume" not in named(calls, "init")[-1][1]  # only the cloud can


def test_aim(tmp_path, calls, monkeypatch):
    run = Recorder(calls, "run", hash="h")
    use(monkeypatch, "aim", Run=Recorder(calls, "Run", answers={"Run": run}), Text=str.upper)
    opened = track(tmp_path, "aim")
    [(_, options)] = named(calls, "Run")
    assert (options["run_hash"], options["experiment"]) == (None, "exp")
    assert opened == ("h", None, str(tmp_path / "runs" / "exp"))
    assert named(calls, "run.track") == [
        ((2.0,), {"name": "train/loss", "step": 1}),
        ((1.0,), {"name": "network/grad_norm/total", "step": 1}),
        ((1.0,), {"name": "train/loss", "step": 2}),
        (("AB",), {"name": "samples", "step": 2}),
    ]
    assert named(calls, "run[]")[0] == (("run", json.loads(json.dumps(FACTS))), {})
    track(tmp_path, "aim", run_id="h")
    assert named(calls, "Run")[-1][1]["run_hash"] == "h"
    assert len(named(calls, "run.add_tag")) == 1

    class MissingRunError(RuntimeError):
        pass

    def lost(run_hash, **options):
        if run_hash is not None:
            raise MissingRunError
        return run

    use(monkeypatch, "aim", Run=lost, Text=str.upper)
    assert track(tmp_path, "aim", run_id="h").last_step == -1  # all is sent to the new one


def test_nested_facts_are_flat_texts():
    assert flat(FACTS) == FLAT
