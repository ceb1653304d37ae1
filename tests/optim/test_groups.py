"""Parameter groups by name pattern."""

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig, SGDConfig


def parameters() -> dict[str, torch.nn.Parameter]:
    names = ("embeddings.weight", "blocks.0.norm.weight", "blocks.0.up.weight", "head.weight")
    return {name: torch.nn.Parameter(torch.ones(2)) for name in names}


def test_overrides_apply_to_matching_names_and_the_first_match_wins() -> None:
    named = parameters()
    config = AdamWConfig(
        weight_decay=0.1,
        group_overrides=(
            GroupOverride(params=["*norm*"], opts={"weight_decay": 0.0}),
            GroupOverride(params=["blocks.*", "head.*"], opts={"lr": 1e-2, "betas": [0.8, 0.9]}),
        ),
    )
    groups = config.build(named).param_groups
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.1]
    assert [g["lr"] for g in groups] == [config.lr, 1e-2, config.lr]
    assert groups[1]["betas"] == (0.8, 0.9)
    members = [[id(p) for p in g["params"]] for g in groups]
    assert members[0] == [id(named["blocks.0.norm.weight"])]
    assert members[1] == [id(named["blocks.0.up.weight"]), id(named["head.weight"])]
    assert members[2] == [id(named["embeddings.weight"])]


def test_frozen_parameters_are_left_out() -> None:
    named = parameters()
    named["head.weight"].requires_grad_(False)
    groups = SGDConfig().build(named).param_groups
    assert sum(len(g["params"]) for g in groups) == 3


def test_a_pattern_that_matches_nothing_is_named() -> None:
    config = AdamWConfig(group_overrides=(GroupOverride(params=["*norn*"], opts={}),))
    with pytest.raises(ConfigError, match=r"group_overrides\.0\.params: '\*norn\*' matches no"):
        config.build(parameters())


def test_an_unknown_setting_is_named() -> None:
    override = GroupOverride(params=["*"], opts={"momentum": 0.9})
    with pytest.raises(ConfigError, match="no setting 'momentum'; known: lr, betas, eps"):
        AdamWConfig(group_overrides=(override,)).build(parameters())
