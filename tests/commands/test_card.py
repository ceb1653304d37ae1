"""What cards say of the run that a model comes from."""

import json
from pathlib import Path

import pytest

from toolkit.commands.card import _command


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/env/bin/toolkit", "train", "my recipe.json"], "toolkit train 'my recipe.json'"),
        (["/code/toolkit/__main__.py", "resume", "runs/a"], "toolkit resume runs/a"),
        (["/env/bin/pytest", "tests"], None),
    ],
)
def test_the_command_can_be_typed_again(
    argv: list[str], command: str | None, tmp_path: Path
) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/command.json").write_text(json.dumps({"argv": argv}))
    assert _command(tmp_path) == command
