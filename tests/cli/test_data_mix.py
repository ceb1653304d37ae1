"""`toolkit data mix`."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import random_text, write_texts
from toolkit.cli import main as cli


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mixture of two folders, trained on for 40 batches of 4 rows of 32 tokens."""
    monkeypatch.chdir(tmp_path)
    sources: dict[str, Any] = {}
    for name, lines, ratio in (("big", 200, 0.75), ("small", 10, 0.25)):
        write_texts(tmp_path / "texts" / name, [random_text(lines)])
        source = {"type": "files", "paths": [f"texts/{name}"]}
        sources[name] = {"ratio": ratio, "source": source}
    sources["small"]["max_repetitions"] = 10
    path = tmp_path / "my.json"
    experiment = {
        "model": {"preset": "gpt2_124M"},
        "dataset": {
            "mix": {"sources": sources},
            "sequence_length": 32,
            "validation_fraction": 0,
            "num_processes": 1,
        },
        "data_loader": {"global_batch_size": 128},
        "trainer": {"max_duration": {"value": 40, "unit": "steps"}},
    }
    path.write_text(json.dumps(experiment))
    return path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_preview_prepares_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "mix", "my.json", "--preview"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cells(lines[0]) == [
        "source", "share", "tokens", "documents", "tokens in run", "epochs", "limit",
    ]  # fmt: skip
    assert cells(lines[1]) == ["big", "75%", "not prepared", "?", "3,840", "?"]
    assert cells(lines[2]) == ["small", "25%", "not prepared", "?", "1,280", "?", "10"]
    assert lines[3] == "5,120 tokens in the run"
    assert not (config.parent / "data").exists()


def test_sources_are_prepared_and_counted(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "mix", "my.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 10 lines of 48 bytes and an end of document: 481 tokens, 15 instances.
    assert cells(lines[2]) == ["small", "25%", "480", "1", "1,280", "2.67", "10"]
    assert cli.run(["data", "mix", "my.json", "--preview", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"][1]["taken_tokens"] == 1280
    assert found["broken_limit"] is None


def test_a_broken_limit_is_shown_and_ends_with_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = "--dataset.mix.sources.small.max_repetitions=2"
    assert cli.run(["data", "mix", "my.json", limit]) == 2
    shown = capsys.readouterr()
    assert cells(shown.out.splitlines()[2])[-2:] == ["2.67", "2"]
    assert "small breaks its limit of 2 repetitions: the run takes 1,280 tokens" in shown.err
    assert "train on at most 3,840 tokens" in shown.err


def test_the_schedule_and_epochs_are_shown(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = "--dataset.mix.schedule=[{at_tokens: 640, ratios: {big: 0.25}}]"
    epochs = "--trainer.max_duration={value: 2, unit: epochs}"
    assert cli.run(["data", "mix", "my.json", "--preview", schedule, epochs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "the run's length is known once all sources are prepared"
    assert [cells(line) for line in lines[5:]] == [
        ["source", "from 0", "from 640"],
        ["big", "75%", "50%"],
        ["small", "25%", "50%"],
    ]


def test_a_mix_goes_by_name_in_files_and_on_the_command_line(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "--dataset.mix=token_folders"
    assert cli.run(["data", "mix", "my.json", "--preview", named]) == 0
    assert [cells(line)[0] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        "code", "math", "web",
    ]  # fmt: skip
    experiment = json.loads(config.read_text())
    experiment["dataset"]["mix"] = "token_folders"
    config.write_text(json.dumps(experiment))
    more = "--dataset.mix.sources.math.ratio=1.1"
    assert cli.run(["data", "mix", "my.json", "--preview", more]) == 0
    assert cells(capsys.readouterr().out.splitlines()[2])[:2] == ["math", "55%"]


def test_without_a_mixture_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "mix", "quickstart", "--preview"]) == 2
    assert "dataset.mix is null: there is no mixture" in capsys.readouterr().err
