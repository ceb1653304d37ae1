"""Every recipe is complete, consistent, and means what it says."""

from pathlib import Path

import msgspec
import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.recipes import copy_recipe, recipe_names, recipe_text
from toolkit.models.presets import PRESETS

EXPECTED = {
    "smoke", "quickstart", "gpt2_124M", "llama_271M", "olmo2_190M", "olmo2_1B", "llama3_8B",
}  # fmt: skip


def test_all_recipes_are_packaged() -> None:
    assert set(recipe_names()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_fits_one_and_two_ranks_and_round_trips(name: str) -> None:
    config = load_experiment(name).config
    for world_size in (1, 2):
        check_experiment(config, world_size)
    assert msgspec.json.decode(config.to_json(), type=ExperimentConfig) == config
    assert config.description
    assert config.run.experiment == name


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_weight_decay_patterns_match_parameters(name: str) -> None:
    from toolkit.optim.groups import parameter_groups

    config = load_experiment(name).config
    model = config.model.build(init_device="meta")
    parameters = dict(model.named_parameters())
    overrides = config.train_module.optim.group_overrides
    groups = parameter_groups(parameters, {"weight_decay": 0.1}, overrides)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert len(groups) == 1 + len(overrides)


def test_quickstart_spells_out_its_preset() -> None:
    model = load_experiment("quickstart").config.model.to_dict()
    assert {name: model[name] for name in PRESETS["quickstart"]} == PRESETS["quickstart"]


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    path = copy_recipe("smoke", tmp_path)
    assert path == tmp_path / "smoke.json"
    assert path.read_text() == recipe_text("smoke")
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists; give another file name"):
        copy_recipe("smoke", tmp_path)
    assert path.read_text() == "mine"
