"""How a run is named on the command line, and which checkpoint of it is continued from."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.cli import main as cli
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import CheckpointError, ConfigError, RunError
from toolkit.experiment import run as running
from toolkit.experiment.load import load_experiment
from toolkit.experiment.resuming import plan_resume, processes_here
from toolkit.launch import capacity
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.workers import toolkit_command
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import find_named
from toolkit.train.config import Duration, TrainerConfig
from toolkit.train.progress import nothing_left


def make(root: Path, experiment: str, name: str, *steps: int) -> Path:
    folder = root / "runs" / experiment / name
    (folder / "metadata").mkdir(parents=True)
    run = RunManager(folder, experiment=experiment, name=name)
    run.log_metadata(load_experiment("smoke").config, RUN_FILES.config)
    run.set_status("running", world_size=1)
    run.close("stopped")
    for step in steps:
        save_checkpoint(
            folder / "checkpoints", step=step, tokens=0, tensors={"model.a": torch.ones(9)},
            rank_state={}, engine="single", rank=0, group=None,
        )  # fmt: skip
    return folder


def test_names_that_runs_lists_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_named("first") == "first"
    folder = make(tmp_path, "quickstart", "first")
    other = make(tmp_path, "quickstart", "second")
    assert find_named("quickstart/first") == find_named("first") == str(folder)
    assert find_named("first/checkpoints/step5") == f"{folder}/checkpoints/step5"
    assert find_named("quickstart/first/checkpoints/step5") == f"{folder}/checkpoints/step5"
    for text in ("quickstart", "third", "runs/quickstart/first", "s3://quickstart/first", ""):
        assert find_named(text) == text
    twin = make(tmp_path, "other", "second")
    with pytest.raises(RunError, match="second: several runs have this name") as error:
        find_named("second")
    assert str(other) in str(error.value)
    assert str(twin) in str(error.value)
    assert find_named("other/second") == str(twin)


@pytest.mark.parametrize(
    "words",
    [["verify", "first"], ["resume", "--explain", "quickstart/first"],
     ["batch", "first", "--step=1"], ["eval", "first"], ["export-hf", "first", "out"],
     ["generate", "first", "--prompt=x"], ["train", "smoke", "--base", "first", "--dry-run"]],
)  # fmt: skip
def test_every_verb_takes_a_name(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What they then say of a run without checkpoints and data is about that run."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "quickstart", "first")
    cli.run(words)
    said = "".join(capsys.readouterr())
    for unknown in (
        "not a run",
        "neither a run",
        "no such folder",
        "is not a model",
        "holds neither",
    ):
        assert unknown not in said


def test_a_step_folder_is_its_run_where_nothing_newer_is_whole(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", "b", 5, 10)
    step5, step10 = (folder / "checkpoints" / f"step{step}" for step in (5, 10))
    assert plan_resume(step10, (), {}).folder == folder
    with pytest.raises(RunError, match="its run has gone on to step10") as error:
        plan_resume(step5, (), {})
    assert f"--save-folder NEW_FOLDER --trainer.load_path={step5}" in str(error.value)
    (step10 / "train" / "rank0.pt").write_bytes(b"")
    assert plan_resume(step5, (), {}).folder == folder
    with pytest.raises(CheckpointError, match=r"train/rank0\.pt has 0 bytes, expected"):
        plan_resume(step10, (), {})
    shutil.rmtree(step10)
    with pytest.raises(RunError, match="step10: no such folder; there is step5"):
        plan_resume(step10, (), {})


def test_a_resume_starts_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(running, "launch", lambda *a, **more: started.append((*a, more["folder"])))
    monkeypatch.setattr(capacity, "free_memory", lambda: 1 << 40)
    folder = make(tmp_path, "a", "b")
    for number in (2, 4):
        running.resume(folder, ["--seed=3"], asked=LaunchPlan(number), debug=True)
    words = ["resume", str(folder), "--seed=3", "--debug"]
    command = toolkit_command(words[:-1], debug=True)
    assert started == [(command, 2, folder), (command, 4, folder)]
    monkeypatch.setenv(ENGINE, "single")
    with pytest.raises(ConfigError, match="--engine asks for the engine single, which is one p"):
        running.resume(folder, asked=LaunchPlan(2))


def test_the_number_of_processes_is_bounded_by_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(capacity.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(capacity, "free_memory", lambda: 1 << 40)
    assert processes_here(32) == 32
    folder = make(tmp_path, "a", "b")
    status = msgspec.json.decode((folder / RUN_FILES.status).read_bytes())
    (folder / RUN_FILES.status).write_bytes(msgspec.json.encode(status | {"world_size": 1_000_000}))
    for words in (["resume"], ["resume", "--explain"]):
        assert cli.run([*words, str(folder)]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert "had 1,000,000 processes; this machine has 2 cores, for at most 32" in said[0]


@pytest.mark.parametrize(
    ("hard_stop", "last", "reached", "expected"),
    [
        (10, 10, 10, "--trainer.hard_stop=null"),
        (20, 20, 20, "--trainer.hard_stop=null --trainer.max_duration='{value: 40, unit: steps}'"),
        (None, 20, 20, "--trainer.max_duration='{value: 40, unit: steps}'"),
        (None, 20, 102, "--trainer.max_duration='{value: 204, unit: steps}'"),
        (10, 10, 15, "--trainer.hard_stop=null"),
        (10, 10, 20, "--trainer.hard_stop=null --trainer.max_duration='{value: 40, unit: steps}'"),
    ],
)
def test_the_end_names_the_flags_that_go_on(
    hard_stop: int | None, last: int, reached: int, expected: str
) -> None:
    stop = Duration(value=hard_stop) if hard_stop is not None else None
    config = TrainerConfig(max_duration=Duration(value=20), hard_stop=stop)
    said = nothing_left(config, last, 20, reached)
    assert said.endswith(f"to go on, add {expected}")
    past = f"and has done {reached} steps already, so no step is trained"
    assert (past in said) == (reached > last)
