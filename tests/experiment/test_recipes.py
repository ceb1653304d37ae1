"""Every recipe is complete, consistent, and means what it says."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from toolkit.commands.plan import plan_experiment
from toolkit.commands.recipes import copy_recipe, describe_recipes
from toolkit.data.config import HFTokenizerConfig
from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.sources import recipe_names, recipe_text
from toolkit.models.presets import PRESETS
from toolkit.runs.files import RUN_FILES

EXPECTED = {
    "smoke", "quickstart", "gpt2_124M", "llama_271M", "llama_271M_c4", "olmo2_190M", "olmo2_1B",
    "olmoe_1B_7B", "llama3_8B", "olmo2_7B", "olmo2_32B", "llama3_70B", "qwen3_30B_A3B",
}  # fmt: skip
FROM_A_MODEL = {
    "finetune", "finetune_lora", "sft_chat", "continue_pretraining", "dpo", "kto", "orpo", "simpo",
    "reward", "distill",
}  # fmt: skip
"""Need `--base`."""
TEACHER = "s3://models/teacher"
"""Is not looked for."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A converted model's folder, as far as configs look at it."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    config = {
        "model": PRESETS["quickstart"],
        "dataset": {
            "tokenizer": {"type": "hf", "path": str(folder / "tokenizer")}, "prepend_bos": True,
        },
        "trainer": {
            "load_path": str(folder), "load_weights_only": True, "load_strategy": "always",
        },
    }  # fmt: skip
    (folder / "finetune.json").write_text(json.dumps(config))
    return str(folder)


def load(name: str, base: str) -> ExperimentConfig:
    flags = [f"--train_module.objective.teacher={TEACHER}"] if name == "distill" else []
    return load_experiment(name, flags, base=base if name in FROM_A_MODEL else None).config


def test_all_recipes_are_packaged() -> None:
    own = {name for name in recipe_names() if not name.startswith("official/")}
    assert own == EXPECTED | FROM_A_MODEL


@pytest.mark.parametrize("name", sorted(EXPECTED | FROM_A_MODEL))
def test_recipe_fits_one_and_two_ranks_and_round_trips(name: str, base: str) -> None:
    config = load(name, base)
    for world_size in (1, 2):
        check_experiment(config, world_size)
    assert msgspec.json.decode(config.to_json(), type=ExperimentConfig) == config
    assert config.description
    assert config.run.experiment == name


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("olmo2_7B", (8, 64)), ("olmo2_32B", (64, 256)), ("llama3_70B", (256, 512)),
        ("qwen3_30B_A3B", (64,)),
    ],
)  # fmt: skip
def test_a_large_recipe_fits_the_gpus_that_it_is_for(name: str, ranks: tuple[int, ...]) -> None:
    loaded = load_experiment(name)
    for number in ranks:
        found = plan_experiment(loaded, {}, world_size=number).data
        assert found["fits"], (number, found["memory"])


@pytest.mark.parametrize("name", sorted(EXPECTED | FROM_A_MODEL))
def test_weight_decay_patterns_match_parameters(name: str, base: str) -> None:
    config = load(name, base)
    model = config.model.build(init_device="meta")
    parameters = dict(model.named_parameters())
    optim = config.train_module.optim
    groups = optim.groups(parameters)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert len(groups) == 1 + len(optim.group_overrides)


def test_quickstart_spells_out_its_preset() -> None:
    model = load_experiment("quickstart").config.model.to_dict()
    assert {name: model[name] for name in PRESETS["quickstart"]} == PRESETS["quickstart"]


def test_a_base_gives_model_tokenizer_and_weights(base: str) -> None:
    loaded = load_experiment("finetune", base=base)
    config, origin = loaded.config, f"--base={base}"
    assert config.model.num_layers == PRESETS["quickstart"]["num_layers"]
    assert config.dataset.tokenizer == HFTokenizerConfig(path=f"{base}/tokenizer")
    assert config.dataset.prepend_bos
    assert config.trainer.load_path == base
    assert config.trainer.load_weights_only
    assert config.trainer.load_strategy == "always"
    # The recipe's 2,048 tokens are more than this model takes.
    assert config.dataset.sequence_length == 1024
    assert config.dataset.dataset_config == "small"
    assert loaded.origins["trainer.load_path"] == origin
    assert loaded.origins["dataset.sequence_length"] == origin
    assert loaded.origins["train_module.optim.lr"] == "recipe finetune"


def test_a_base_that_moved_is_taken_from_where_it_is(base: str, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    config = load_experiment("finetune", base=str(moved)).config
    assert config.trainer.load_path == str(moved)
    assert config.dataset.tokenizer == HFTokenizerConfig(path=f"{moved}/tokenizer")


def test_a_run_as_base_gives_the_tokenizer_that_it_keeps(tmp_path: Path) -> None:
    flags = ["--dataset.tokenizer={type: bpe}", "--dataset.prepend_bos=true"]
    run = load_experiment("smoke", [*flags, f"--dataset.root={tmp_path}/gone"]).config
    (tmp_path / "metadata").mkdir()
    (tmp_path / RUN_FILES.config).write_bytes(run.to_json())
    with pytest.raises(ConfigError, match="and its tokenizer with it; restore"):
        load_experiment("finetune", base=str(tmp_path))
    (tmp_path / RUN_FILES.tokenizer).mkdir()
    config = load_experiment("finetune", base=str(tmp_path)).config
    assert config.dataset.tokenizer == HFTokenizerConfig(path=f"{tmp_path}/tokenizer")
    assert config.dataset.prepend_bos
    assert config.model == run.model


def test_flags_come_after_a_base(base: str) -> None:
    config = load_experiment("finetune", ["--model.num_layers=2"], base=base).config
    assert (config.model.num_layers, config.trainer.load_path) == (2, base)


def test_a_base_replaces_the_model_of_a_recipe(base: str) -> None:
    config = load_experiment("gpt2_124M", base=base).config
    assert config.model.to_dict()["type"] == "transformer"
    assert config.dataset.tokenizer == HFTokenizerConfig(path=f"{base}/tokenizer")


def test_a_recipe_without_a_model_asks_for_a_base() -> None:
    with pytest.raises(ConfigError, match=r"^finetune: starts from a model of yours; give --base"):
        load_experiment("finetune")


def test_a_folder_that_is_no_model_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds neither finetune\.json nor a run; make a base with"
    ):
        load_experiment("finetune", base=str(tmp_path))


def test_recipes_are_listed_by_size_and_those_without_a_model_last() -> None:
    listed = [recipe for recipe in describe_recipes() if not recipe.name.startswith("official/")]
    assert listed[0].name == "smoke"
    last = listed[-len(FROM_A_MODEL) :]
    assert [recipe.name for recipe in last] == sorted(FROM_A_MODEL)
    needs = {recipe.name: recipe.needs for recipe in last}
    for name in ("distill", "dpo", "kto", "orpo", "reward", "simpo"):
        assert needs.pop(name) == ["--base", "download"]
    assert needs == {
        "continue_pretraining": ["--base", "download"],
        "finetune": ["--base"],
        "finetune_lora": ["--base", "download"],
        "sft_chat": ["--base", "download"],
    }


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    path = copy_recipe("smoke", tmp_path)
    assert path == tmp_path / "smoke.json"
    assert path.read_text() == recipe_text("smoke")
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists; give another file name"):
        copy_recipe("smoke", tmp_path)
    assert path.read_text() == "mine"
