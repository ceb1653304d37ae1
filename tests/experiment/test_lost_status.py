"""Run folders in which a file that tells how far the run came is gone, or is no file."""

import os
from pathlib import Path

import pytest

from toolkit.cli import main as cli
from toolkit.commands.verify import verify_checkpoints
from toolkit.experiment.sources import recipe_text
from toolkit.metrics.lines import last_record
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager


@pytest.mark.parametrize("content", [None, "", "[]", '{"state": 1}'])
def test_a_run_without_its_status_says_how_to_go_on(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metadata").mkdir()
    run = RunManager(tmp_path, experiment="a", name="b")
    run.close("finished")
    (tmp_path / RUN_FILES.config).write_text(recipe_text("smoke"))
    (tmp_path / RUN_FILES.status).unlink()
    if content is not None:
        (tmp_path / RUN_FILES.status).write_text(content)
    for words in (["resume", str(tmp_path)], ["verify", str(tmp_path), "--replay", "1"]):
        assert cli.run(words) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path}: its metadata/status.json is missing or damaged" in said
        assert f"--trainer.load_path={tmp_path}" in said
    assert verify_checkpoints(tmp_path, quick=False) == []


def test_a_pipe_in_the_place_of_metrics_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    assert last_record(tmp_path / "train.jsonl") == {}


def test_the_last_step_is_found_before_damaged_lines(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"step": 4}\n' + "[" * 5000 + "\n" + '{"ste')
    assert last_record(tmp_path / "train.jsonl") == {"step": 4}


def test_a_run_without_its_config_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metadata").mkdir()
    RunManager(tmp_path, experiment="a", name="b").close("finished")
    assert cli.run(["resume", str(tmp_path)]) == 2
    assert "it was started from Python" in capsys.readouterr().err
    (tmp_path / RUN_FILES.origins).write_text("{}")
    assert cli.run(["resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path}/metadata/config.json: is missing" in said
    assert f"--trainer.load_path={tmp_path}" in said
