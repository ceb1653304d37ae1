"""Optimizers and schedules as `module:Class`: no entry anywhere, and one line where it is wrong."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.config import convert
from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_parameters
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.optim.base import OptimizerTraits, traits_of
from toolkit.optim.config import AdamWConfig, ClassOptimConfig, SGDConfig
from toolkit.optim.schedules import ClassScheduleConfig

OPTIM, SCHEDULER = "train_module.optim", "train_module.scheduler"
MODULE = """
import torch

class Still:
    pass

class SignSGD(torch.optim.Optimizer):
    needs_whole_matrices = True

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()

class Root:
    def __init__(self, power=0.5):
        self.power = power

    def __call__(self, progress):
        return 1 - progress**self.power

broken = 3
"""


@pytest.fixture(autouse=True)
def _own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_optim.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.fspath(tmp_path))


def load(*flags: str) -> ExperimentConfig:
    return load_experiment("quickstart", flags).config


def test_an_optimizer_of_ones_own_is_built_in_groups_and_stored() -> None:
    config = load(
        f"--{OPTIM}.type=own_optim:SignSGD",
        f"--{OPTIM}.options={{weight_decay: 0.5}}",
        f"--{OPTIM}.lr=0.25",
    )
    optim = config.train_module.optim
    assert isinstance(optim, ClassOptimConfig)
    assert convert(config.to_dict(), ExperimentConfig) == config
    check_parameters(config)
    named = {
        "embeddings.tokens.weight": torch.nn.Parameter(torch.ones(2)),
        "a.norm.weight": torch.nn.Parameter(torch.ones(2)),
        "head.weight": torch.nn.Parameter(torch.ones(2)),
    }
    built = optim.build(named)
    assert [g["weight_decay"] for g in built.param_groups] == [0.0, 0.5]
    # An argument that only a group has another value of.
    (plain, *_) = optim.replace(options={}).build(named).param_groups
    assert plain["weight_decay"] == 0.0
    named["head.weight"].grad = torch.tensor([2.0, -3.0])
    for other in ("embeddings.tokens.weight", "a.norm.weight"):
        named[other].grad = torch.zeros(2)
    built.step()
    assert named["head.weight"].tolist() == [0.75, 1.25]
    assert traits_of(built) == OptimizerTraits(needs_whole_matrices=True)


def test_a_section_may_name_the_class_as_its_type() -> None:
    given = {"type": "torch.optim:RAdam", "lr": 0.5}
    config = convert({**load().to_dict(), "train_module": {"optim": given}}, ExperimentConfig)
    assert config.train_module.optim == ClassOptimConfig(target="torch.optim:RAdam", lr=0.5)
    flag = load(f"--{OPTIM}={{type: 'torch.optim:RAdam', lr: 0.5}}").train_module.optim
    assert flag.replace(group_overrides=()) == config.train_module.optim


def test_a_schedule_of_ones_own_follows_the_warm_up() -> None:
    config = load(f"--{SCHEDULER}={{type: 'own_optim:Root', warmup: 4, options: {{power: 2}}}}")
    schedule = config.train_module.scheduler
    assert isinstance(schedule, ClassScheduleConfig)
    check_parameters(config)
    assert [schedule.factor(n, 14) for n in (0, 3, 4, 9, 14)] == [0.25, 1.0, 1.0, 0.75, 0.0]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (f"{OPTIM}.type=own_optim:Sign", f"{OPTIM}.type: own_optim:Sign: module 'own_optim' has"),
        (f"{OPTIM}.type=no_such:Sign", f"{OPTIM}.type: no_such:Sign: No module named 'no_such'"),
        (f"{OPTIM}.type=own_optim:broken", f"{OPTIM}.type: own_optim:broken: is no class: 3"),
        (f"{OPTIM}={{type: class, target: x}}", f"{OPTIM}.type: write it as module:Class, not 'x'"),
        (f"{SCHEDULER}.type=own_optim:Rot", f"{SCHEDULER}.type: own_optim:Rot: module 'own_opt"),
        (
            f"{OPTIM}={{type: 'own_optim:SignSGD', options: {{beta: 1}}}}",
            f"{OPTIM}.options: own_optim:SignSGD: got an unexpected keyword argument 'beta'",
        ),
        (
            f"{SCHEDULER}={{type: 'own_optim:Root', options: {{pow: 2}}}}",
            f"{SCHEDULER}.type: own_optim:Root cannot be made: TypeError: ",
        ),
        (
            f"{SCHEDULER}={{type: 'own_optim:Still'}}",
            f"{SCHEDULER}.type: own_optim:Still: calling it with a progress fails: TypeError: ",
        ),
    ],
)
def test_a_wrong_class_is_one_line_before_anything_starts(flag: str, expected: str) -> None:
    config = load(f"--{flag}")
    with pytest.raises(ConfigError) as error:
        check_parameters(config)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_engines_are_told_whose_kernels_scale_and_skip() -> None:
    named: dict[str, Any] = {"w": torch.nn.Parameter(torch.ones(2))}
    fused = {"fused": True}
    for config, takes in [
        (AdamWConfig(), True),
        (SGDConfig(), True),
        (ClassOptimConfig(target="torch.optim:Adam"), False),
        (ClassOptimConfig(target="torch.optim:Adam", options=fused), True),
    ]:
        assert traits_of(config.build(named)) == OptimizerTraits(takes_found_inf=takes)
