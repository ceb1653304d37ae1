"""What cards say of the run that a model comes from."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.commands.card import (
    _command,
    _config_text,
    _model,
    _sizes,
    _tells_all,
    hub_data_sets,
)
from toolkit.data.config import DataLoaderConfig, DatasetConfig, FilesSourceConfig
from toolkit.data.order.schedule import BatchSizeChangeConfig
from toolkit.experiment.load import load_experiment
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import parameter_shapes


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/env/bin/toolkit", "train", "my recipe.json"], "toolkit train 'my recipe.json'"),
        (["/code/toolkit/__main__.py", "resume", "runs/a"], "toolkit resume runs/a"),
        (["/env/bin/pytest", "tests"], None),
    ],
)
def test_the_command_can_be_typed_again(argv: list[str], command: str | None) -> None:
    assert _command({"argv": argv}) == command


@pytest.mark.parametrize(
    ("argv", "resumes", "tells"),
    [
        (["x", "train", "quickstart", "--seed=1"], [["x", "resume", "runs/a"]], True),
        (["x", "train", "quickstart"], [["x", "resume", "runs/a", "--seed=2"]], False),
        (["x", "train", "mine.yaml"], [], False),
        (["x", "train", "quickstart", "--seed=${N}"], [], False),
        (["script.py"], [], False),
    ],
)
def test_a_command_tells_all_of_a_recipe_that_no_resume_changed(
    argv: list[str], resumes: list[list[str]], tells: bool
) -> None:
    facts: Any = SimpleNamespace(
        command={"argv": argv}, resumes=[{"argv": resume} for resume in resumes]
    )
    assert _tells_all(facts) == tells


def test_the_config_of_a_card_has_no_defaults_and_no_places() -> None:
    flags = ["--dataset.root=/my/data", "--run.root=/my/runs", "--train_module.optim.lr=0.5"]
    text = _config_text(load_experiment("quickstart", flags).stored)
    assert "    lr: 0.5\n" in text
    assert "d_model: 192" in text
    assert not any(word in text for word in ("/my/", "callbacks", "description", "dropout"))


def test_an_adapter_counts_its_own_parameters_and_names_its_base() -> None:
    config = load_experiment("smoke").config.model
    lora = LoRAConfig(rank=2, target_modules=("*.attention.*",))
    source: Any = SimpleNamespace(config=config, lora=lora, hub_name=None, base_name="run/step4/hf")
    rows = _model(source, "X", "float32", merged=False)
    shapes = parameter_shapes(config.to_transformer(), lora)
    own = sum(math.prod(shape) for name, shape in shapes.items() if "lora" in name)
    assert rows["Parameters"].startswith(f"{own:,} of the adapter, beside ")
    assert rows["Base"] == "run/step4/hf, which is not on the hub"
    assert "Base" not in _model(source, "X", "float32", merged=True)


def test_sizes_are_those_that_were_trained_on() -> None:
    values = DataLoaderConfig(
        global_batch_size=64,
        batch_size_schedule=(
            BatchSizeChangeConfig(tokens=0, global_batch_size=1024),
            BatchSizeChangeConfig(tokens=5000),
            BatchSizeChangeConfig(tokens=9000),
        ),
    )
    assert values.first_batch_size == 1024
    assert _sizes(values.batch_sizes, 8000) == "1,024 tokens, 2,048 tokens after 5,000 tokens"


def test_files_of_a_data_set_on_the_hub_name_it() -> None:
    paths = [
        "hf://datasets/allenai/c4/en/*.json.gz",
        "hf://datasets/allenai/c4@main/fr/1.json.gz",
        "https://huggingface.co/datasets/me/mine.v2/resolve/main/a.jsonl",
        "texts/allenai/c4/",
    ]
    dataset = DatasetConfig(source=FilesSourceConfig(paths=paths))
    assert hub_data_sets(dataset) == ["allenai/c4", "me/mine.v2"]
