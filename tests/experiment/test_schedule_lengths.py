"""Schedules that do not fit the run are refused before anything starts; recipes can be tried."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.checks import batches_of
from toolkit.experiment.load import load_experiment
from toolkit.experiment.schedules import check_schedule_lengths, schedule_notices

SCHEDULER = "train_module.scheduler"


def check(*flags: str) -> list[str]:
    """Of a run of 20 steps of 1,024 tokens, with a warm-up of 5; the notices."""
    loaded = load_experiment("smoke", flags)
    batches = batches_of(loaded.config, None)
    check_schedule_lengths(loaded.config, batches, loaded.origins)
    return list(schedule_notices(loaded.config, batches, loaded.origins))


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (f"{SCHEDULER}.warmup=500", f"{SCHEDULER}.warmup: 500 steps, and the whole run (trainer."),
        (f"{SCHEDULER}={{type: wsd, units: tokens, warmup: 1000, decay: 20000}}",
         f"{SCHEDULER}.decay: the decay takes 20,000 tokens, and 19,480 tokens"),
        (f"{SCHEDULER}.decay_from=30", f"{SCHEDULER}.decay_from: the run (trainer.max_duration)"),
        ("train_module.schedules={weight_decay: {type: constant, warmup: 21}}",
         "train_module.schedules.weight_decay.warmup: 21 steps, and the whole run"),
        ("train_module={optim: {type: normuon, beta2: 0.9}, schedules: {beta2: {type: composable, "
         "stages: [{duration: 9, end_lr: 2}]}}}", "train_module.schedules.beta2: makes it "),
        ("train_module={optim: {type: adamw, group_overrides: [{params: ['*norm*'], opts: "
         "{betas: [0.999, 0.9]}}]}, schedules: {betas.0: {type: composable, "
         "stages: [{duration: 9, end_lr: 0.91}]}}}", "train_module.schedules.betas.0: makes it 1"),
        ("train_module.schedules={betas.0: {type: composable, stages: [{duration: 9, end_lr: 2}]}}",
         "train_module.schedules.betas.0: makes it "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(flag: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(f"--{flag}")
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_a_file_says_what_its_own_run_is(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    file: dict[str, Any] = {"model": {"preset": "quickstart"}, "train_module": {}, "trainer": {}}
    file["train_module"]["scheduler"] = {"type": "linear", "warmup": 50}
    file["trainer"]["max_duration"] = {"value": 40}
    path.write_text(json.dumps(file))
    loaded = load_experiment(str(path))
    with pytest.raises(ConfigError, match=r"warmup: 50 steps, and the whole run .* is 40 steps"):
        check_schedule_lengths(loaded.config, batches_of(loaded.config, None), loaded.origins)
    loaded = load_experiment(str(path), ["--trainer.max_duration.value=30"])
    check_schedule_lengths(loaded.config, batches_of(loaded.config, None), loaded.origins)


def test_a_recipe_can_be_tried_for_some_steps() -> None:
    [line] = check("--trainer.max_duration.value=3")
    assert line.startswith(f"{SCHEDULER}.warmup is 5 steps and the whole run")
    assert check("--train_module.scheduler.warmup=5") == []


def test_a_schedule_in_epochs_waits_for_data_that_is_not_there_yet() -> None:
    epochs: Any = f"--{SCHEDULER}={{type: wsd, units: epochs, warmup: 0.5, decay: 9}}"
    assert check(epochs) == []
    target = "{custom: {target: 'tests.data.instances.custom_examples:Counting'}}"
    with pytest.raises(
        ConfigError, match=rf"{SCHEDULER}\.units: the data does not say how long an"
    ):
        check(epochs, f"--dataset={target}")
