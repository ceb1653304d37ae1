"""Tasks with choices: the same numbers during training and by `toolkit eval --tasks`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.test_tasks import write_task
from toolkit.cli import main as cli

QUESTIONS = [
    (f"line {n}: é and", [f" {n * n}", f" {n + 1}", " some thing"][: 2 + n % 2], n % 2)
    for n in range(9)
]


@pytest.fixture(scope="module")
def task_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a task at 2 and 4, stopped at 3 and resumed."""
    folder = tmp_path_factory.mktemp("tasks")
    text = folder / "text.txt"
    text.write_text("".join(f"line {n}: é and {n * n}\n" for n in range(400)), encoding="utf-8")
    (folder / "other.txt").write_text("".join(f"{n * 7} other words, ü\n" for n in range(40)))
    write_task(folder / "squares", QUESTIONS, "acc_per_char")
    args = [
        "train", "smoke", "--save-folder", str(folder / "run"), "--data-root", str(folder / "data"),
        f"--dataset.source={{type: files, paths: ['{text}']}}", "--dataset.num_processes=1",
        f"--run.root={folder / 'runs'}",
        "--trainer.max_duration.value=4", "--trainer.hard_stop.value=2",
        "--data_loader.eval_tokens=600", "--trainer.callbacks.lm_evaluator.interval=2",
        f"--dataset.eval_sets.other.source={{type: files, paths: ['{folder}/other.txt']}}",
        f"--trainer.callbacks.downstream_evaluator={{tasks: ['{folder}/squares'], interval: 2}}",
        "--trainer.callbacks.checkpointer={interval: 2, export_hf: false}",
        "--trainer.callbacks.system_monitor.enabled=false",
    ]  # fmt: skip
    assert cli.run(args) == 0
    assert cli.run(["resume", str(folder / "run"), "--trainer.hard_stop=null"]) == 0
    return folder


def lines(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert cli.run(["eval", *args, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics/eval.jsonl").read_text().splitlines()]


def test_a_further_set_has_a_name_of_its_own(
    task_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["other", "val", "downstream/squares"]
    found = records(task_run / "run")
    assert [(r["step"], r["name"]) for r in found] == [(s, n) for s in (2, 4) for n in names]
    again = lines(capsys, str(task_run / "run"))
    keys = ("name", "loss", "ppl", "bits_per_byte", "num_targets")
    assert [[r[k] for k in keys] for r in again] == [[r[k] for k in keys] for r in found[3:5]]


def test_training_records_each_step_once_and_eval_gives_the_same(
    task_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = task_run / "run"
    recorded = [r for r in records(run) if r["name"].startswith("downstream/")]
    assert [record["step"] for record in recorded] == [2, 4]
    for record, where in zip(recorded, [run / "checkpoints/step2", run], strict=True):
        (found,) = lines(capsys, str(where), "--tasks", str(task_run / "squares"))
        assert found["name"] == record["name"] == "downstream/squares"
        assert found["step"] == record["step"]
        keys = record.keys() - {"step", "tokens", "time", "name", "seconds"}
        assert {key: found[key] for key in keys} == {key: record[key] for key in keys}
        assert {"length-normalized accuracy", "BPB v2", "soft loss", "num_documents"} <= keys
        assert all(map(math.isfinite, (record[key] for key in keys)))
    assert recorded[0]["BPB"] != recorded[1]["BPB"]


def test_an_export_has_the_numbers_of_its_run(
    task_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export-hf", str(task_run / "run"), str(tmp_path / "out"), "--no-check"]) == 0
    task = str(task_run / "squares")
    capsys.readouterr()
    (theirs,), (ours,) = (
        lines(capsys, str(where), "--tasks", task) for where in (tmp_path / "out", task_run / "run")
    )
    assert theirs["BPB"] == pytest.approx(ours["BPB"], rel=1e-6)
    assert cli.run(["eval", str(task_run / "run"), "--tasks", task]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{task_run / 'run'}, step 4: data tasks, sequence_length 64,")
    assert out[1].split("  ")[0] == "task"
    assert out[2].startswith("squares  length-normalized accuracy ")


@pytest.mark.parametrize(("args", "message"), [
    (["--tasks", "./nowhere"], "nowhere: no task there; it has no requests.jsonl.gz"),
    (["--tasks", "a,a"], "--tasks: a: two tasks of this name"),
    (["--tasks", "{task}", "--files", "x"], "--tasks and --files: give one of the two"),
    (["--tasks", "{task}", "--stride", "3"], "--stride goes with --files"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(
    task_run: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    given = [arg.format(task=task_run / "squares") for arg in args]
    assert cli.run(["eval", str(task_run / "run"), *given]) == 2
    assert message in capsys.readouterr().err


def test_an_evaluator_that_is_off_needs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", "smoke", "--save-folder", str(tmp_path / "run"), "--dry-run"]
    key = "--trainer.callbacks.downstream_evaluator"
    assert cli.run([*flags, f"{key}.enabled=false", f"{key}.tasks=[no_such_task]"]) == 0
    assert cli.run([*flags, f"{key}.tasks=[no/such_task]"]) == 2
    assert "no/such_task: no task there" in capsys.readouterr().err
