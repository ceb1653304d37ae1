"""The `console` blocks of the README run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.commands.batch import step_batch
from toolkit.commands.explain import explain_resume
from toolkit.experiment.recorded import config_of

README = (ROOT / "README.md").read_text()
COMMANDS = commands(README)


@pytest.mark.timeout(900)
def test_readme_commands_run_one_after_the_other(tmp_path: Path) -> None:
    """They share a folder and build on each other, as they do for a reader."""
    assert len(COMMANDS) >= 10
    folder = reader_folder(tmp_path)
    for command in COMMANDS:
        run_command(command, folder)


def test_readme_python_example_trains(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code) == 1
    result = subprocess.run(
        [sys.executable, "-c", code[0]],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    run = folder / "runs" / "smoke" / "by_hand"
    assert (run / "checkpoints" / "step20" / ".metadata.json").is_file()
    assert len((run / "metrics" / "train.jsonl").read_text().splitlines()) == 20
    longer = "--trainer.max_duration.value=22"
    explanation = explain_resume(run, [longer], {})
    assert explanation.refused == []
    assert dict(explanation.rows)["goes on"] == ["from step 21 to 22"]
    changes = dict(explanation.rows)["config"]
    assert changes == ["trainer.max_duration.value: 20 -> 22"]
    assert step_batch(run, 3, show=0).is_checked
    assert config_of(run, 1).seed == 3
    run_command(f"toolkit resume {run} {longer}", folder)
    assert len((run / "metrics" / "train.jsonl").read_text().splitlines()) == 22


def test_readme_names_only_files_that_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"accelerate_configs/\w+\.yaml", README):
        assert (ROOT / name).exists(), name


def test_readme_error_example_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    from toolkit.cli.main import run

    command, expected = re.search(r"\$ toolkit (.*)\n(error: .*)\n", README).groups()  # type: ignore[union-attr]
    assert run(command.split()) == 2
    assert capsys.readouterr().err.strip() == expected
