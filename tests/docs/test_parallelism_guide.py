"""The commands of docs/parallelism.md run as they stand, and its tables name what exists."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.docs.running import ROOT, commands, reader_folder, run_command
from toolkit.cli import main as cli
from toolkit.commands.plan.search import ROOM

GUIDE = (ROOT / "docs" / "parallelism.md").read_text()


def test_the_commands_run(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    found = commands(GUIDE)
    assert len(found) == 4
    for command in found:
        run_command(command, folder)


def test_it_names_files_that_exist() -> None:
    for name in re.findall(r"accelerate_configs/\w+\.yaml", GUIDE):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / link).exists(), link


def planned(capsys: pytest.CaptureFixture[str], words: str) -> Any:
    assert cli.run(["plan", *shlex.split(words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_its_numbers_are_what_the_commands_beside_them_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = re.findall(r"\| \d* \| `(\w+ --[^`]*)` \| (\d+) \| ([\d.]+) s \| (\d+)% \|", GUIDE)
    assert len(rows) == 16
    for words, memory, time, mfu in rows:
        found = planned(capsys, words)
        told = round(found["memory"]["total"] / 2**30), f"{found['seconds']['total']:.1f}"
        assert (*told, f"{found['seconds']['mfu']:.0%}") == (int(memory), time, f"{mfu}%"), words


def test_the_table_of_recipes_is_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    pattern = r"\| `(\w+)` \| [^|]*GPUs \| [^|]* \| (\d+) GiB on (\d+) \| (\d+)% \|"
    rows = re.findall(pattern, GUIDE)
    assert len(rows) == 5
    for name, memory, ranks, mfu in rows:
        found = planned(capsys, f"{name} --world-size {ranks}")
        assert round(found["memory"]["total"] / 2**30) == int(memory), name
        assert round(100 * found["seconds"]["mfu"]) == int(mfu), name
        assert found["memory"]["total"] <= ROOM * found["memory"]["device"], name
