"""SEMANTICS 12: what a resume changes is shown."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from toolkit.experiment.changes import config_changes
from toolkit.experiment.load import load_experiment


def stored(config: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(config))


def test_each_changed_value_is_one_line() -> None:
    before = stored(load_experiment("smoke").config)
    after = load_experiment(
        "smoke",
        [
            "--train_module.optim.lr=0.5",
            "--trainer.max_duration={value: 7, unit: tokens}",
            "--run.name=other",
        ],
    ).config
    lr = before["train_module"]["optim"]["lr"]
    duration = before["trainer"]["max_duration"]
    assert config_changes(before, after) == [
        f"train_module.optim.lr: {lr} -> 0.5",
        f"trainer.max_duration.value: {duration['value']} -> 7",
        f'trainer.max_duration.unit: "{duration["unit"]}" -> "tokens"',
    ]


def test_fields_that_only_one_of_them_has_are_shown() -> None:
    config = load_experiment("smoke").config
    before = stored(config)
    before["train_module"]["scheduler"] = {"type": "constant", "units": "steps", "warmup": 0}
    assert "train_module.scheduler.alpha_f: unset -> " in " ".join(config_changes(before, config))


def test_nothing_changed_nothing_shown() -> None:
    config = load_experiment("quickstart").config  # has lists of mappings
    assert config_changes(stored(config), config) == []


def test_a_mapping_in_the_place_of_null_is_one_line_and_what_is_not_kept_none() -> None:
    before = stored(load_experiment("smoke").config)
    before["trainer"]["hard_stop"] = None
    flags = ["--trainer.hard_stop={value: 110, unit: steps}", "--trainer.start_anew"]
    after = load_experiment("smoke", flags).config
    assert config_changes(before, after) == ["trainer.hard_stop: null -> {value: 110, unit: steps}"]
    none = load_experiment("smoke", ["--trainer.hard_stop=null"]).config
    assert config_changes(stored(after), none) == [
        "trainer.hard_stop: {value: 110, unit: steps} -> null"
    ]


def test_a_path_made_absolute_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def config(root: str, *paths: str) -> Any:
        source = f"--dataset.source={{type: files, paths: [{', '.join(paths)}]}}"
        return load_experiment(
            "smoke", ["--dataset.dataset_name=d", f"--dataset.root={root}", source]
        ).config

    before = stored(config("data", "mine", "more"))
    same = config("/there/data", "/there/mine", "/there/more")
    assert config_changes(before, same, "/there") == []
    here = config(f"{tmp_path}/data", "mine", f"{tmp_path}/more")
    assert config_changes(before, here, None) == []
    other = config("/else/data", "/there/mine", "/there/much")
    assert sorted(config_changes(before, other, "/there")) == [
        'dataset.root: "data" -> "/else/data"',
        'dataset.source.paths: ["mine","more"] -> ["/there/mine","/there/much"]',
    ]
