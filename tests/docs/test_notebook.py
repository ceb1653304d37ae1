"""notebooks/first_run.ipynb: short, without outputs, and it runs from top to bottom."""

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.running import ROOT

PATH = ROOT / "notebooks" / "first_run.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_it_is_read_without_outputs() -> None:
    nbformat.validate(NOTEBOOK)
    assert len(PATH.read_text().splitlines()) < 250
    assert all(not cell.outputs and cell.execution_count is None for cell in CODE)
    for cell in CODE:
        compile(cell.source, PATH.name, "exec")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(PATH, tmp_path)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(
        nbformat.read(PATH, as_version=4), timeout=200, kernel_name="python3", resources=resources
    )
    said = client.execute()
    *_, written, last = (cell for cell in said.cells if cell.cell_type == "code")
    assert len("".join(output.get("text", "") for output in written.outputs)) > 30
    assert 1.0 < float(last.outputs[-1]["data"]["text/plain"]) < 4.0
    run = tmp_path / "first_run/runs/notebook/first"
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert {"step100", "step150"} <= set(steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_run", PATH.name]
