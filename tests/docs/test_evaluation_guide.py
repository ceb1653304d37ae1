"""docs/evaluation.md: its commands run, and its names are those in the code."""

from pathlib import Path

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.evaluate.tasks.metrics import LABELS

GUIDE = (ROOT / "docs" / "evaluation.md").read_text()


def test_a_task_of_ones_own_is_scored_as_it_stands(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    making, *others = commands(GUIDE)
    assert making == "mkdir -p my_tasks/units"
    (folder / "my_tasks/units").mkdir(parents=True)
    said = [run_command(command, folder) for command in others]
    assert "eval at step 20: downstream/units accuracy " in said[1]
    assert "units  accuracy " in said[2]


def test_every_metric_is_in_the_guide() -> None:
    for label in (*LABELS.values(), "soft loss", "log soft loss"):
        assert f"`{label}`" in GUIDE
