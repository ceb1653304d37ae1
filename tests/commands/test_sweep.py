"""`toolkit sweep`: points of a grid, checked first, each a run that is resumed or skipped."""

import sys
import threading
import time
from pathlib import Path

import pytest

from tests.runs.made import make_run
from toolkit.commands.sweep import points, running
from toolkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError, SeveralErrors
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import read_status

TRAINER = """
import json, signal, sys, time
from toolkit.runs.registry import start_run
words = sys.argv[1:]
print("words", *words)
resumed = words[0] == "resume"
name = words[1].rpartition("/")[2] if resumed else words[words.index("--name") + 1]
run = start_run("smoke", name, root="runs", resume=resumed)
how = "stop" if "wait" in name else "fail" if "fail" in name and not resumed else ""
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
if how == "stop" and not resumed:
    print("waiting", flush=True)
    while not asked:
        time.sleep(0.01)
    run.path("metrics/train.jsonl").write_text('{"step": 1, "loss": 2.0}\\n')
    run.close("stopped", step=1)
    sys.exit(75)
lr = float(name.rpartition("=")[2])
run.path("metrics/train.jsonl").write_text('{"step": 2, "loss": 2.0}\\n')
line = {"step": 2, "name": "val", "loss": abs(lr - 0.02)}
run.path("metrics/eval.jsonl").write_text(json.dumps(line) + "\\n")
run.close("failed" if how == "fail" else "finished", step=2, message=how or None)
sys.exit(1 if how == "fail" else 0)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Training takes as long as it takes to write a folder."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(
        running, "toolkit_command", lambda words, debug: [sys.executable, str(script), *words]
    )


def some(tmp_path, name, *texts):
    return [
        points.Point(
            f"{name}-lr={text}",
            {"train_module.optim.lr": text},
            tmp_path / "runs" / "smoke" / f"{name}-lr={text}",
            None,
        )
        for text in texts
    ]


OPTIONS = running.Options("smoke", ["--seed=3"], more=["--data-root=d"], launch=["--processes=1"])


def test_short_paths_are_resolved_where_only_one_value_is_called_so():
    (axis,) = points.axes(["optim.lr=1e-3, 3e-3"])
    assert axis == ("train_module.optim.lr", ("1e-3", "3e-3"), "optim.lr")
    (axis,) = points.axes(["--trainer.hard_stop={value: 1, unit: steps},null"])
    assert axis.texts == ("{value: 1, unit: steps}", "null")
    for grids, said in (
        ([], "give --grid PATH=VALUE,VALUE"),
        (["optim.lr"], "write PATH=VALUE,VALUE"),
        (["optim.lr=1,,2"], "a value is empty"),
        (["optim.lr=1e-3,0.001"], "0.001 is the same value as 1e-3"),
        (["seed=1,1"], "1 stands there twice"),
        (["type=a,b"], r"type: could be .*\.type or .*; write one of them"),
        (["optim.lrr=1,2"], r"no such config value; did you mean train_module\.optim\.lr\?"),
        (["seed=1", "seed=2"], "seed: stands there twice"),
        (["interval=1,2"], "interval: could be trainer.callbacks.*; write one of them"),
        (["optim.nope=1,2"], "no such config value"),
        (["run.name=a,b"], "every point has its own"),
    ):
        with pytest.raises(ConfigError, match=said):
            points.axes(grids)


def test_a_grid_is_all_combinations_or_some_drawn_by_seed():
    axes = points.axes(["optim.lr=1,2,3", "seed=0,1"])
    grid = points.choose(axes, None, 0)
    assert [tuple(values.values()) for values in grid] == [
        ("1", "0"), ("1", "1"), ("2", "0"), ("2", "1"), ("3", "0"), ("3", "1"),
    ]  # fmt: skip
    drawn = points.choose(axes, 3, 5)
    assert len(drawn) == 3
    assert drawn == points.choose(axes, 3, 5)
    assert all(point in grid for point in drawn)
    assert points.choose(axes, 99, 0) == grid
    with pytest.raises(ConfigError, match="--random 0: give 1 or more"):
        points.choose(axes, 0, 0)


def test_points_have_names_by_value_and_each_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = points.choose(points.axes(["optim.lr=1e-3,3e-3", "seed=0,1"]), None, 0)
    found = points.points("smoke", [], grid, name="s")
    assert [point.name for point in found][:2] == ["s-lr=1e-3-seed=0", "s-lr=1e-3-seed=1"]
    assert found[0].folder == tmp_path / "runs/smoke/s-lr=1e-3-seed=0"
    assert found[3].loaded.config.train_module.optim.lr == 3e-3
    assert found[3].flags == ["--train_module.optim.lr=3e-3", "--seed=1"]
    grid = points.choose(points.axes(["optim.lr=1e-3,abc,x"]), None, 0)
    with pytest.raises(SeveralErrors) as error:
        points.points("smoke", [], grid, name="s")
    assert [str(one).partition(": expected")[0] for one in error.value.errors] == [
        "s-lr=abc: train_module.optim.lr",
        "s-lr=x: train_module.optim.lr",
    ]
    with pytest.raises(ConfigError, match=r"--run\.save_folder: every point has its own"):
        points.points("smoke", ["--run.save_folder=x"], grid, name="s")
    assert not (tmp_path / "runs").exists()


def test_a_point_whose_run_was_started_with_another_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = points.choose(points.axes(["seed=0"]), None, 0)
    (point,) = points.points("smoke", [], grid, name="s")
    config = point.loaded.stored.to_dict()
    make_run(tmp_path / "runs", "s-seed=0", losses=[1.0], experiment="smoke", config=config)
    points.points("smoke", [], grid, name="s")
    with pytest.raises(ConfigError, match=r"started with another config \(train_module.optim.lr: "):
        points.points("smoke", ["--train_module.optim.lr=0.5"], grid, name="s")


def test_points_are_trained_skipped_and_retried(tmp_path, trainer, capfd):
    said: list[str] = []
    both = [*some(tmp_path, "a", "0.05"), *some(tmp_path, "fail", "0.02")]
    assert running.run_points(both, OPTIONS, said.append) == EXIT_FAILED
    assert said == ["[1/2] a-lr=0.05: started", "[2/2] fail-lr=0.02: started"]
    assert (
        "words train smoke --seed=3 --data-root=d --processes=1 --train_module.optim.lr=0.05 "
        "--name a-lr=0.05\n"
    ) in capfd.readouterr().err
    best, other = running.outcomes(both)
    assert (best.name, best.state, best.message, best.val_loss) == (
        "fail-lr=0.02", "failed", "fail", 0.0,
    )  # fmt: skip
    assert (other.state, round(other.val_loss, 6), other.step) == ("finished", 0.03, 2)
    said.clear()
    assert running.run_points(both, OPTIONS, said.append) == EXIT_FAILED
    assert said == [
        "[1/2] a-lr=0.05: finished",
        "[2/2] fail-lr=0.02: failed; --retry tries it again",
    ]
    assert running.run_points(both, OPTIONS._replace(retry=True), said.append) == EXIT_DONE
    assert read_status(both[1].folder).attempt == 2


def test_a_stop_goes_to_the_running_points_and_the_same_sweep_goes_on(tmp_path, trainer, capfd):
    runs = some(tmp_path, "wait", "0.1", "0.2", "0.3")
    options = OPTIONS._replace(jobs=2)
    sweep = running._Sweep(runs, options, [dict(running.os.environ)] * 2, lambda text: None)
    thread = threading.Thread(target=sweep.run)
    thread.start()
    logs = [run.folder / RUN_FILES.status for run in runs[:2]]
    deadline = time.monotonic() + 30
    while capfd.readouterr().err.count("waiting") == 0 or not all(map(Path.exists, logs)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    sweep.ask("SIGINT")
    thread.join(30)
    assert [running.need_of(run, retry=False) for run in runs] == ["resume", "resume", "new"]
    assert sweep.reason == "SIGINT"
    (last,) = some(tmp_path, "a", "0.3")
    assert running.run_points([*runs[:2], last], options, lambda text: None) == EXIT_DONE
    assert [read_status(run.folder).attempt for run in runs[:2]] == [2, 2]
    assert EXIT_STOPPED == 75
