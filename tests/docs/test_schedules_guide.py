"""The pictures, examples and commands of docs/schedules.md are those of the schedules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.running import ROOT
from toolkit.cli import main as cli
from toolkit.config import convert
from toolkit.experiment.load import load_experiment
from toolkit.optim.schedules import SchedulerConfig

GUIDE = (ROOT / "docs" / "schedules.md").read_text()
BARS = "▁▂▃▄▅▆▇█"
COLUMNS, STEPS = 32, 3200


def picture(kind: str) -> str:
    schedule: Any = convert({"type": kind}, SchedulerConfig)  # type: ignore[arg-type]
    steps = [round((column + 0.5) * STEPS / COLUMNS) for column in range(COLUMNS)]
    factors = [schedule.factor(step, STEPS, peak=3e-4) for step in steps]
    return "".join(BARS[min(7, int(8 * factor))] for factor in factors)


def test_the_table_has_every_type_and_its_picture() -> None:
    shown = dict(re.findall(r"^\| `(\w+)` \| `([▁-█]+)` \|", GUIDE, flags=re.MULTILINE))
    kinds = {kind.__struct_config__.tag for kind in SchedulerConfig.__args__}  # type: ignore[attr-defined]
    assert shown.keys() == kinds - {"class"}
    assert shown == {kind: picture(kind) for kind in shown}


def test_the_table_has_every_shared_setting() -> None:
    shared = set(convert({"type": "constant"}, SchedulerConfig).to_dict()) - {"type"}  # type: ignore
    table = GUIDE.partition("All types share")[2].partition("The rate of a step")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= shared


def holds(stored: Any, given: Any) -> bool:
    """Whether everything that is given is stored so."""
    if isinstance(given, dict):
        return all(holds(stored[key], value) for key, value in given.items())
    if isinstance(given, list):
        return all(holds(kept, value) for kept, value in zip(stored, given, strict=True))
    return bool(stored == given)


def test_json_examples_are_configs(tmp_path: Path) -> None:
    examples = re.findall(r"```json\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(examples) == 6
    for example in examples:
        data = json.loads(f"{{{example}}}")
        if "scheduler" in data:
            data = {"train_module": data}
        path = tmp_path / "my.json"
        path.write_text(json.dumps({"model": {"preset": "llama_271M"}, **data}))
        stored = load_experiment(str(path)).config.to_dict()
        assert holds(stored, data)


def test_the_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n(.*?)```", GUIDE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    ran = 0
    for number, line in enumerate(lines):
        if not line.startswith("$ toolkit schedule"):
            continue
        words = [w.replace("'", "") for w in re.findall(r"(?:[^\s']|'[^']*')+", line[2:])]
        words = words[1 : words.index(">")] if ">" in words else words[1:]
        following = lines[number + 1] if number + 1 < len(lines) else ""
        expected = 2 if following.startswith("error: ") else 0
        assert cli.run(words) == expected, line
        assert not expected or capsys.readouterr().err.strip() == following
        ran += 1
    assert ran == 4
    assert (tmp_path / "schedule.png").is_file()
