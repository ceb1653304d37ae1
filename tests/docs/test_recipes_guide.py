"""docs/recipes.md names every official recipe and mix, with the figures of the recipes."""

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.running import ROOT, commands
from tests.experiment.test_official_recipes import PUBLISHED, load
from toolkit.cli.main import run as toolkit
from toolkit.data.order.config import mix_names
from toolkit.errors import EXIT_DONE
from toolkit.wording import count

GUIDE = (ROOT / "docs" / "recipes.md").read_text()


def test_the_table_has_the_figures_of_every_official_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OLMO_DATA_ROOT", "s3://olmo")
    monkeypatch.setenv("PYTHON_EDU", "/python")
    rows = re.findall(
        r"^\| `([\w.-]+)` \| ([\d,]+) \| ([\d,]+) \| ([\w, ]+) \| ([\d.e-]+) \| ([\d to]+) \| \[",
        GUIDE,
        flags=re.MULTILINE,
    )
    assert [row[0] for row in rows] == list(PUBLISHED)
    for name, parameters, batch, steps, rate, gpus in rows:
        published, config = PUBLISHED[name], load(name).config
        assert parameters == f"{config.model.num_parameters:,}"
        assert batch == f"{config.data_loader.global_batch_size:,}"
        duration = config.trainer.max_duration
        assert steps == (
            f"{published.steps:,}" if published.steps else count(duration.value, "epoch")
        )
        assert float(rate) == config.train_module.optim.lr
        few, many = published.gpus
        assert gpus == (f"{few}" if few == many else f"{few} to {many}")


def test_the_table_has_every_mix() -> None:
    table = GUIDE.partition("## Mixes")[2].partition("## A ladder")[0]
    cells = re.findall(r"^\| (`[^|]*)\|", table, flags=re.MULTILINE)
    told: list[str] = []
    for words in (re.findall(r"`([\w-]+)`", cell) for cell in cells):
        stem = words[0].rpartition("-")[0]
        told += [f"{stem}{word}" if word.startswith("-") else word for word in words]
    assert sorted(told) == sorted(mix_names())


def test_the_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(GUIDE):
        words = shlex.split(command)
        with monkeypatch.context() as environ:
            while "=" in words[0]:
                environ.setenv(*words.pop(0).split("=", 1))
            assert words.pop(0) == "toolkit"
            assert toolkit(words) == EXIT_DONE, command
        assert capsys.readouterr().out
    assert Path("my.json").is_file()
