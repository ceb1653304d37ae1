"""Recipes for readers, and the schema of configs."""

from pathlib import Path
from typing import Any, NamedTuple

from toolkit.config.files import SCHEMA_KEY, write_new
from toolkit.config.interpolation import variables
from toolkit.config.paths import local_path
from toolkit.config.schema import json_schema
from toolkit.data.config import TOKENIZER_PRESETS, HFTokenizerConfig, HubSourceConfig
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.sources import OFFICIAL, engine_files, recipe_names, recipe_text
from toolkit.models.presets import PRESETS

__all__ = ["copy_recipe", "describe_recipes", "engine_files", "experiment_schema", "recipe_text"]


class Recipe(NamedTuple):
    name: str
    config: ExperimentConfig
    """With any model, where `--base` gives one."""
    needs: list[str]
    """What is not on every machine: `--base`, `download`, and variables of the environment."""

    @property
    def has_model(self) -> bool:
        return "--base" not in self.needs


def describe_recipes() -> list[Recipe]:
    """All recipes: our own, then those of published models. Of both, those that start from a model
    (`--base`) last, the others by size."""

    def order(recipe: Recipe) -> tuple[bool, bool, int, str]:
        size = recipe.config.model.num_parameters if recipe.has_model else 0
        return recipe.name.startswith(OFFICIAL), not recipe.has_model, size, recipe.name

    return sorted(map(_describe, recipe_names()), key=order)


def _describe(name: str) -> Recipe:
    needs = [] if '"model"' in recipe_text(name) else ["--base"]
    flags = ["--model.preset=quickstart"] if needs else []
    config = load_experiment(name, flags, fills=False).config
    dataset = config.dataset
    corpora = [dataset, *(dataset.mix.sources.values() if dataset.mix is not None else ())]
    is_remote = any(isinstance(corpus.source, HubSourceConfig) for corpus in corpora)
    if is_remote or isinstance(dataset.tokenizer, HFTokenizerConfig):
        needs.append("download")
    return Recipe(name, config, [*needs, *variables(config)])


def copy_recipe(name: str, destination: str | Path) -> Path:
    """Write a recipe, or one of `engine_files`, to the file `destination`, or into that folder;
    returns the file."""
    text, path = recipe_text(name), local_path(str(destination), "DEST")
    own_name = name.removeprefix(OFFICIAL)
    own_name = own_name if name in engine_files() else f"{own_name.removesuffix('.json')}.json"
    path = path / own_name if path.is_dir() else path
    write_new(path, text)
    return path


def experiment_schema() -> dict[str, Any]:
    """The schema of what `toolkit train` reads: `ExperimentConfig`, or with a preset as model, and
    `$schema`, by which an editor finds this schema."""
    schema = json_schema(ExperimentConfig)
    properties = schema["$defs"]["ExperimentConfig"]["properties"]
    model = properties["model"]
    with_preset = {
        "type": "object",
        "description": "A named size; further fields replace the preset's.",
        "properties": {"preset": {"enum": sorted(PRESETS)}},
        "required": ["preset"],
    }
    choices = model.pop("anyOf", None)
    model["anyOf"] = [*(choices or [{"$ref": model.pop("$ref", None)}]), with_preset]
    tokenizer = schema["$defs"]["DatasetConfig"]["properties"]["tokenizer"]
    tokenizer["anyOf"] = [*tokenizer["anyOf"], {"enum": sorted(TOKENIZER_PRESETS)}]
    properties[SCHEMA_KEY] = {
        "type": "string",
        "description": "Where the schema of this file is, for editors.",
    }
    return schema
