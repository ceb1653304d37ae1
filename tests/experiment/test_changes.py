"""SEMANTICS 12: what a resume changes is shown."""

from typing import Any

import msgspec

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
