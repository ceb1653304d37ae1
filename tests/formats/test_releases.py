"""What earlier releases left on disk still resumes, verifies, exports, evaluates and is listed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.formats.make import ENVIRONMENT, FIRST_STEP, FSDP, HERE, LAST_STEP, SINGLE, tensor_hash
from toolkit.checkpoint.folder import TENSORS_FOLDER
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.cli import main as cli

RELEASES = sorted(HERE.glob("release_*"))
ROUNDING = 1e-5
"""Relative: releases of torch and kinds of CPU add up in different orders."""


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def release(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The current folder is a copy of the release's; returns what must be found in it."""
    # Not the times of files, as in a clone of the repository.
    shutil.copytree(request.param, tmp_path / "release", copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "release")
    return json.loads(Path("expected.json").read_text())


def lines(run: Path, name: str) -> dict[int, dict[str, Any]]:
    text = (run / "metrics" / f"{name}.jsonl").read_text()
    return {line["step"]: line for line in map(json.loads, text.splitlines())}


def output(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert cli.run([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def check_equal(run: Path, before: dict[int, dict[str, Any]], *, steps: range) -> None:
    after = lines(run, "train")
    assert list(after) == [*range(1, steps.stop)]
    for step in steps:
        for key in ("loss", "lr", "grad_norm", "tokens", "epoch", "skipped"):
            assert after[step][key] == pytest.approx(before[step][key], rel=ROUNDING), (step, key)
        assert after[step]["attempt"] == 2


def test_tensors_of_checkpoints_are_bit_equal(release: dict[str, Any]) -> None:
    for checkpoint, hashes in release["tensors"].items():
        found = dict(iterate_tensors(Path(checkpoint) / TENSORS_FOLDER, ""))
        assert {name: tensor_hash(tensor) for name, tensor in found.items()} == hashes


def test_a_run_resumes_with_the_recorded_losses(release: dict[str, Any]) -> None:
    train, evaluation = lines(SINGLE, "train"), lines(SINGLE, "eval")
    checkpoints = SINGLE / "checkpoints"
    shutil.move(checkpoints / f"step{LAST_STEP}", "recorded")
    assert cli.run(["resume", str(SINGLE)]) == 0
    check_equal(SINGLE, train, steps=range(FIRST_STEP + 1, LAST_STEP + 1))
    for step, line in lines(SINGLE, "eval").items():
        assert line["loss"] == pytest.approx(evaluation[step]["loss"], rel=ROUNDING)
    recorded = dict(iterate_tensors(Path("recorded") / TENSORS_FOLDER, ""))
    resumed = dict(iterate_tensors(checkpoints / f"step{LAST_STEP}" / TENSORS_FOLDER, ""))
    for name, tensor in recorded.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-6, msg=name)


def test_a_run_of_two_ranks_resumes_on_one(release: dict[str, Any]) -> None:
    """And its mixture goes on where it was: eight steps in one go give the same last four."""
    launcher = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", "resume", FSDP, "--trainer.hard_stop=null"],
        env=os.environ | ENVIRONMENT | launcher, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = {line["step"]: line for line in release["continued"]}
    check_equal(FSDP, before, steps=range(FIRST_STEP + 1, LAST_STEP + 1))
    for step in before:
        for source in ("instances/squares", "instances/cubes"):
            assert lines(FSDP, "train")[step][source] == before[step][source]


def test_steps_replay_and_checkpoints_verify(
    release: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for run, number in ((SINGLE, 2), (FSDP, 1)):
        assert output(capsys, "verify", run).split().count("OK") == number
    replayed = LAST_STEP - FIRST_STEP
    text = output(capsys, "verify", SINGLE, "--replay", replayed, "--step", FIRST_STEP)
    assert f": {replayed} losses" in text


def test_batches_are_of_the_recorded_tokens(
    release: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for run, batches in release["batches"].items():
        for step, batch in batches.items():
            found = json.loads(output(capsys, "batch", run, "--step", step, "--json"))
            # Later releases say more of a batch.
            assert {name: found[name] for name in batch} == batch


def test_evaluations_give_the_recorded_losses(
    release: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def losses(evaluation: dict[str, Any]) -> dict[str, float]:
        return {score["name"]: score["loss"] for score in evaluation.get("scores", [evaluation])}

    found = losses(json.loads(output(capsys, "eval", SINGLE, "--json")))
    assert found == pytest.approx(losses(release["eval"]), rel=ROUNDING)
    assert output(capsys, "export-hf", SINGLE, "exported", "--check").startswith("exported: ")
    text = Path("texts/answers.jsonl")
    files = ("--files", text, "--text-field", "completion", "--json")
    ours = losses(json.loads(output(capsys, "eval", SINGLE, *files)))
    theirs = losses(json.loads(output(capsys, "eval", "exported", *files)))
    # The run masks attention between documents, which no folder of transformers says.
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_runs_are_listed_before_and_after_reindexing(
    release: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def rows() -> dict[str, list[str]]:
        table = output(capsys, "runs").splitlines()[1:]
        return {row.split()[0]: row.split()[1:7] for row in table}

    before = rows()
    assert set(before) == {"formats/single", "formats/fsdp"}
    assert output(capsys, "runs", "reindex").startswith("2 runs")
    assert rows() == before


def test_prepared_data_is_taken_as_it_is(
    release: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for config in ("single.json", "fsdp.json"):
        before = {path: path.stat().st_mtime_ns for path in Path("data").rglob("*.bin")}
        output(capsys, "prepare", config)
        assert {path: path.stat().st_mtime_ns for path in Path("data").rglob("*.bin")} == before
