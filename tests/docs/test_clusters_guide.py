"""The commands of docs/clusters.md run, and its tables name every option."""

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.running import ROOT, commands
from toolkit.cli import main as cli
from toolkit.commands.launch import TARGETS
from toolkit.commands.launch.target import Target, target_class

GUIDE = (ROOT / "docs" / "clusters.md").read_text()


def test_every_dry_run_prints_what_would_be_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [command for command in commands(GUIDE) if command.endswith(" --dry-run")]
    assert len(shown) == 7
    for command in shown:
        assert cli.run(shlex.split(command)[1:]) == 0, command
        assert "toolkit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_all_targets_and_every_target_is_named() -> None:
    table = GUIDE.partition("## Options of every target")[2].partition("\n## ")[0]
    named = set(re.findall(r"`--([\w-]+)", table))
    assert {field.replace("_", "-") for field in Target.__struct_fields__} <= named
    for name in TARGETS:
        own = set(target_class(name).__struct_fields__) - set(Target.__struct_fields__)
        missing = [field for field in own if f"--{field.replace('_', '-')}" not in GUIDE]
        assert missing in ([], ["description"], ["workdir"]), name


def test_the_target_of_ones_own_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    (tmp_path / "desk.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.run(["launch", "smoke", "--to", "desk:Desk", "--desk", "3", "--dry-run"]) == 0
