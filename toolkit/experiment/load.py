"""From `toolkit train SOURCE --flags` to an `ExperimentConfig` that knows where each value is from.

1. SOURCE is a JSON file or the name of a recipe; both hold a complete config.
2. `{"preset": NAME, ...}` in the model section becomes that preset, under the section's other
   values. The name of a mix in `dataset.mix` becomes what the mix holds.
3. `--base FOLDER` gives model, tokenizer and weights to start from (base.py); recipes for
   fine-tuning have none of their own.
4. Flags follow: the short ones (`--sequence-length`), then overrides (`--a.b.c=VALUE`) in the order
   given. `--model.preset=NAME` replaces the model section before the other flags apply.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.config import (
    ConfigLayers,
    Override,
    parse_json_mapping,
    parse_override_args,
    read_json_mapping,
)
from toolkit.data.order.mix_files import inline_mixes
from toolkit.errors import ConfigError, RunError
from toolkit.experiment.base import longest_sequence, read_base
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recipes import recipe_hint, recipe_names, recipe_text
from toolkit.models.counts import shown_parameters
from toolkit.models.presets import preset
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import find_named, is_run

SHORTHANDS: dict[str, str] = {
    "name": "run.name",
    "sequence_length": "dataset.sequence_length",
    "data_root": "dataset.root",
    "save_folder": "run.save_folder",
    "work_dir": "run.work_dir",
}
"""Options of the command line that stand for one config value each."""

RUN_ORIGIN = "run"


class LoadedExperiment(NamedTuple):
    """A resolved config with the origin of each leaf value."""

    config: ExperimentConfig
    origins: dict[str, str]
    """`path -> origin`: "default", a recipe, a file, a preset, a flag as typed, or "run"."""
    source: str
    """The recipe, file or run folder it was loaded from."""


def load_experiment(
    source: str,
    overrides: Sequence[str] = (),
    shorthands: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
) -> LoadedExperiment:
    """Load a recipe or JSON file and apply the command line to it.

    Args:
        shorthands: names in `SHORTHANDS` to values; None means not given.
        base: folder of a converted model or of a run, to start from.

    Raises:
        ConfigError: no such source, or a name or value that does not fit.
    """
    data, origin = _read_source(source)
    layers = ConfigLayers(ExperimentConfig)
    _add(layers, data, origin)
    if base is not None:
        _add_base(layers, Path(find_named(base)).expanduser())
    for name, value in (shorthands or {}).items():
        if value is not None:
            layers.set(SHORTHANDS[name], value, f"--{name.replace('_', '-')}={value}")
    _apply_overrides(layers, overrides)
    if "model" not in layers.data:
        raise ConfigError(
            f"{source}: starts from a model of yours; give --base FOLDER, made by "
            "`toolkit convert-hf`, or the folder of a run"
        )
    config = layers.resolve()
    return LoadedExperiment(config, layers.origins(config), source)


class RecipeSummary(NamedTuple):
    """A line about one recipe."""

    name: str
    description: str
    num_parameters: int | None
    """None: those of the model it starts from."""
    shown_parameters: str
    """The same for a reader, with the active ones where these are fewer."""
    sequence_length: int
    needs: list[str]
    """What is not on every machine."""


def describe_recipes() -> list[RecipeSummary]:
    """All recipes: those that start from a model (`--base`) last, the others by size."""
    found = [_describe_recipe(name) for name in recipe_names()]
    return sorted(found, key=lambda recipe: (recipe.num_parameters or sys.maxsize, recipe.name))


def _describe_recipe(name: str) -> RecipeSummary:
    data, origin = _read_source(name)
    has_model = "model" in data
    layers = ConfigLayers(ExperimentConfig)
    # Any model does: only what the recipe itself says is shown.
    _add(layers, data if has_model else {**data, "model": {"preset": "quickstart"}}, origin)
    config = layers.resolve()
    needs = [] if has_model else ["--base"]
    return RecipeSummary(
        name,
        config.description,
        config.model.num_parameters if has_model else None,
        shown_parameters(config.model) if has_model else "-",
        config.dataset.sequence_length,
        [*needs, "download"] if config.needs_download else needs,
    )


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> LoadedExperiment:
    """Load the config a run was started with and apply the command line of a resume.

    Raises:
        RunError: `run_dir` is not a run folder.
        ConfigError: its config cannot be read, or an override does not fit.
    """
    path = run_dir / RUN_FILES.config
    if not path.is_file():
        if is_run(run_dir):
            raise RunError(
                f"{run_dir}: has no {RUN_FILES.config}; it was started from Python, of parts that "
                "no config describes: go on with the same script and start_run(..., resume=True)"
            )
        raise RunError(
            f"{run_dir}: not a run folder (it has no {RUN_FILES.config}); `toolkit runs` lists runs"
        )
    layers = ConfigLayers(ExperimentConfig)
    _add(layers, read_json_mapping(path), RUN_ORIGIN)
    _apply_overrides(layers, overrides)
    config = layers.resolve()
    return LoadedExperiment(config, layers.origins(config), str(run_dir))


def _read_source(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source).expanduser()
    if path.is_file():
        return read_json_mapping(path), source
    if source in recipe_names():
        return parse_json_mapping(recipe_text(source), f"recipe {source}"), f"recipe {source}"
    if path.is_dir():
        raise ConfigError(f"{source}: a folder; give a JSON file or a recipe ({recipe_hint('')})")
    kind = "file" if source.endswith(".json") or "/" in source else "recipe or file"
    raise ConfigError(f"{source}: no such {kind}; {recipe_hint(path.stem)}")


def _add(layers: ConfigLayers[ExperimentConfig], data: dict[str, Any], origin: str) -> None:
    model = data.get("model")
    if isinstance(model, dict) and "preset" in model:
        name = model["preset"]
        if not isinstance(name, str):
            raise ConfigError(f"model.preset: expected the name of a preset, not {name!r}")
        layers.add({"model": preset(name)}, f"preset {name}")
        rest = {key: value for key, value in model.items() if key != "preset"}
        data = {**data, "model": rest}
        if not rest:
            del data["model"]
    dataset = data.get("dataset")
    if isinstance(dataset, dict) and "mix" in dataset:
        data = {**data, "dataset": {**dataset, "mix": inline_mixes(dataset["mix"])}}
    layers.add(data, origin)


def _add_base(layers: ConfigLayers[ExperimentConfig], folder: Path) -> None:
    """Take what `folder` says in the place of the model and tokenizer there are."""
    base, origin = read_base(folder), f"--base={folder}"
    layers.data.pop("model", None)
    dataset = layers.data.setdefault("dataset", {})
    if "tokenizer" in base.get("dataset", {}):
        dataset.pop("tokenizer", None)
    longest, wanted = longest_sequence(base["model"]), dataset.get("sequence_length")
    if longest is not None and wanted is not None and wanted > longest:
        base.setdefault("dataset", {})["sequence_length"] = longest
    _add(layers, base, origin)


def _apply_overrides(layers: ConfigLayers[ExperimentConfig], args: Sequence[str]) -> None:
    short = [name.replace("_", "-") for name in SHORTHANDS]
    overrides = parse_override_args(
        args,
        sections=ExperimentConfig.__struct_fields__,
        options=[*short, "base", "dry-run", "json", "debug"],
    )
    for override in overrides:
        if override.path == "model.preset":
            layers.set("model", preset(override.text), override.flag)
    for override in overrides:
        if override.path == "model":
            _set_model(layers, override)
        elif override.path == "dataset.mix":
            layers.set("dataset.mix", inline_mixes(layers.parse(override)), override.flag)
        elif override.path != "model.preset":
            layers.apply(override)


def _set_model(layers: ConfigLayers[ExperimentConfig], override: Override) -> None:
    model = layers.parse(override)
    if isinstance(model, dict) and "preset" in model:
        model = {**preset(str(model.pop("preset"))), **model}
    layers.set("model", model, override.flag)
