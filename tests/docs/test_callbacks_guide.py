"""The guides to callbacks and to own models: their commands run, and they name what there is."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from tests.docs.running import ROOT, commands, reader_folder
from tests.workers import WorkerPool
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import CallbacksConfig

GUIDE = (ROOT / "docs" / "callbacks.md").read_text()
OWN_MODELS = (ROOT / "docs" / "own_models.md").read_text()


def run_in(folder: str, command: str) -> int:
    """A command of a guide, in this worker; its exit code."""
    from toolkit.cli.main import run

    place, _, rest = command.rpartition(" && ")
    os.chdir(Path(folder) / place.removeprefix("cd "))
    sys.path.insert(0, os.getcwd())
    return run(shlex.split(rest)[1:])


def test_the_commands_of_both_guides_run_as_they_stand(workers: WorkerPool, tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (example,) = re.findall(r"```python\n# my_callbacks\.py\n(.*?)```", GUIDE, flags=re.DOTALL)
    (folder / "my_callbacks.py").write_text(example)
    shown = [*commands(GUIDE), *commands(OWN_MODELS)]
    assert len(shown) == 6
    for command in shown:
        assert workers.run(1, run_in, str(folder), command) == [0], command
    assert (folder / "averaged_weights/model.safetensors").is_file()
    lines = (folder / "runs/smoke/timed/metrics/train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    timed = [record["step"] for record in records if "mean_step_seconds" in record]
    assert timed == list(range(3, len(records) + 1))
    scores = (folder / "runs/classify_images/first/metrics/eval.jsonl").read_text().splitlines()
    assert json.loads(scores[-1])["loss"] < 0.1


def test_every_callback_and_event_is_told_of() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for name in set(CallbacksConfig.__struct_fields__) - {"custom"}:
        assert f"`{name}`" in pages, name
    for event, hook in vars(Callback).items():
        if callable(hook):
            assert f"`{event}`" in GUIDE, event


def test_links_lead_somewhere() -> None:
    for page in (GUIDE, OWN_MODELS):
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert (ROOT / "docs" / link).exists(), link
