"""The commands that the pages of docs/learn/ and docs/troubleshooting.md show as run do run."""

import json
import re
from pathlib import Path

import pytest

from tests.docs.running import ROOT, commands, reader_folder, run_command


def commands_of(page: str) -> list[str]:
    return commands(next((ROOT / "docs").rglob(f"{page}.md")).read_text())


@pytest.mark.timeout(600)
def test_first_run_then_serve_then_compare(tmp_path: Path) -> None:
    """In this order, in one folder: the second and third go on from the run of the first."""
    folder = reader_folder(tmp_path)
    shown = [commands_of(page) for page in ("first_run", "serve", "compare_runs")]
    assert [len(page) for page in shown] == [7, 4, 5]
    for command in [command for page in shown for command in page]:
        run_command(command, folder)
    first, high = folder / "runs/smoke/first", folder / "runs/smoke/high"
    steps = {path.name for path in (first / "checkpoints").iterdir()}
    assert {"step10", "step20", "step30"} <= steps
    files = {path.name for path in (folder / "exported/first").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= files
    losses = [
        [
            json.loads(line)["loss"]
            for line in (run / "metrics/train.jsonl").read_text().splitlines()
        ]
        for run in (first, high)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0][19] != losses[1][19]
    check_metrics(first)


def check_metrics(run: Path) -> None:
    """Every name that the run recorded stands on docs/reference/metrics.md."""
    page = (ROOT / "docs/reference/metrics.md").read_text()
    named = set(re.findall(r"`([\w./]+)`", page))
    for file in (run / "metrics").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            found = {re.sub(r"^(\w+)/.*", r"\1/LAYER", name) for name in json.loads(line)}
            assert {re.sub(r"^gpu\d+", "gpuN", name) for name in found} <= named, file.name


@pytest.mark.parametrize(
    ("page", "number"), [("own_data", 4), ("many_gpus", 2), ("troubleshooting", 2)]
)
def test_commands_of_a_page_by_itself(page: str, number: int, tmp_path: Path) -> None:
    shown = commands_of(page)
    assert len(shown) == number
    folder = reader_folder(tmp_path)
    for command in shown:
        run_command(command, folder)
