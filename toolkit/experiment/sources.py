"""What a config is made from beside files and flags: recipes, `--base`, and names for own data."""

import os
import re
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import xxhash

from toolkit.checkpoint.folder import METADATA_FILE
from toolkit.config import ConfigLayers, nearest
from toolkit.config.check import check
from toolkit.config.files import read_json_mapping
from toolkit.config.named import named
from toolkit.data.config import DatasetConfig
from toolkit.data.corpus_info import data_places
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import ConfigError, ToolkitError
from toolkit.experiment.recorded import found_config, stored_config
from toolkit.models.presets import PRESETS
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import is_url

FINETUNE_FILE = "finetune.json"
"""The config that `toolkit convert-hf` writes beside a converted model."""

OFFICIAL = "official/"
"""Recipes of published models: names begin so."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ORIGIN = "--dataset.source"
_PATHS = ("paths", "path")
_NAMES = ("type", "name", "config", "split")
_LONGEST = 40


def recipe_names() -> list[str]:
    """Our own, and those of models that others published, as `official/NAME`."""
    names = [entry.name for entry in _folder().iterdir()]
    names += [f"{OFFICIAL}{entry.name}" for entry in (_folder() / OFFICIAL).iterdir()]
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def engine_files() -> list[str]:
    """YAMLs of `accelerate launch`, and JSONs of DeepSpeed."""
    return sorted(entry.name for entry in (_folder() / "engines").iterdir())


def recipe_text(name: str) -> str:
    """The text of a recipe (NAME or NAME.json), or of one of `engine_files`, as it stands in the
    package."""
    if name in engine_files():
        return (_folder() / "engines" / name).read_text(encoding="utf-8")
    own = name.removesuffix(".json")
    if own not in recipe_names():
        raise ConfigError(f"{name}: no such recipe; {recipe_hint(name)}")
    return (_folder() / f"{own}.json").read_text(encoding="utf-8")


def recipe_hint(name: str) -> str:
    near = nearest(name, [*recipe_names(), *(engine_files() if "." in name else ())])
    if near:
        return f"did you mean {near!r}?"
    own = [known for known in recipe_names() if not known.startswith(OFFICIAL)]
    return f"recipes: {', '.join(own)}, and those of published models in `toolkit recipes`"


def _folder() -> Traversable:
    return resources.files("toolkit") / "recipes"


def read_base(folder: Path) -> dict[str, Any]:
    """What a config takes from a converted model or a run: model, tokenizer, where to load."""
    if (folder / FINETUNE_FILE).is_file():
        model, dataset = _of_converted(read_json_mapping(folder / FINETUNE_FILE), folder)
    elif (folder / RUN_FILES.config).is_file():
        model, dataset = _of_run(stored_config(folder), folder)
    else:
        raise ConfigError(f"--base {folder}: {_no_base(folder)}")
    base: dict[str, Any] = {
        "model": model,
        "trainer": {
            "load_path": str(folder.resolve()),
            "load_weights_only": True,
            "load_strategy": "always",
        },
    }
    if dataset.get("tokenizer") is not None:
        base["dataset"] = {**dataset, "dataset_config": folder.resolve().name}
    return base


def without_model(source: str, data: dict[str, Any]) -> str:
    """What to say of a config that has no model, and gets none from `--base`."""
    if source in recipe_names() and not Path(source).is_file():
        return (
            f"{source}: starts from a model of yours; give --base FOLDER, made by "
            "`toolkit convert-hf`, or the folder of a run"
        )
    if "model_type" in data or "architectures" in data:
        folder = Path(source).parent
        return (
            f"{source}: a model's config of transformers, not of an experiment; convert the model "
            f"with `toolkit convert-hf {folder} OUT`, then `toolkit train finetune --base OUT`"
        )
    return (
        f"{source}: model: required, and not given; write "
        '"model": {"preset": "quickstart"} into it, or give --model.preset=quickstart (presets: '
        f"{', '.join(PRESETS)}), or --base FOLDER"
    )


def longest_sequence(model: dict[str, Any]) -> int | None:
    return model.get("max_sequence_length") or model.get("n_positions")


def _no_base(folder: Path) -> str:
    """Why `folder` is none, and the command that makes one of what it is."""
    then = "then give --base"
    if (folder / METADATA_FILE).is_file() or (folder.parent / METADATA_FILE).is_file():
        return f"a checkpoint; give its run folder, or train with --trainer.load_path={folder}"
    if (folder / "config.json").is_file():
        out = f"models/{folder.resolve().name}"
        return (
            "a model of transformers, not converted yet; convert it first: "
            f"`toolkit convert-hf {folder} {out}`, {then} {out}"
        )
    if folder.is_dir():
        return (
            f"holds neither {FINETUNE_FILE} nor a run; make a base with "
            f"`toolkit convert-hf SRC OUT`, {then} OUT, or give a run folder"
        )
    if _HUB_NAME.fullmatch(str(folder)):
        out = f"models/{folder.name}"
        return (
            "no such folder; if it is a model of the hub, fetch and convert it first: "
            f"`toolkit convert-hf {folder} {out}`, {then} {out}"
        )
    return "no such folder; `toolkit convert-hf SRC OUT` makes one, `toolkit runs` lists runs"


def _of_converted(data: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model, and what it wants of its data: tokenizer and how documents start."""
    dataset = _of_dataset(data)
    tokenizer, before = dataset["tokenizer"], data.get("trainer", {}).get("load_path")
    path = (tokenizer or {}).get("path")
    if path and before and Path(path).is_relative_to(before):
        # The folder may have moved since.
        moved = folder.resolve() / Path(path).relative_to(before)
        dataset["tokenizer"] = {**tokenizer, "path": str(moved)}
    return data.get("model", {}), dataset


def _of_run(data: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model of a run, and the tokenizer that its data was made with."""
    config, dataset = found_config(folder), _of_dataset(data)
    prepared = [place / TOKENIZER_FOLDER for place in data_places(config.data)]
    for tokenizer in (folder / RUN_FILES.tokenizer, *prepared):
        if tokenizer.is_dir():
            return data["model"], dataset | {
                "tokenizer": {"type": "hf", "path": str(tokenizer.resolve())}
            }
    if (dataset["tokenizer"] or {}).get("type") == "bpe":
        raise ConfigError(
            f"--base {folder}: the data it was trained on is not here any more, and its tokenizer "
            f"with it; restore {data_places(config.data)[0]}"
        )
    return data["model"], dataset


def _of_dataset(data: dict[str, Any]) -> dict[str, Any]:
    dataset = data.get("dataset", {})
    return {
        "tokenizer": dataset.get("tokenizer"),
        "prepend_bos": dataset.get("prepend_bos", False),
    }


def name_own_data(layers: ConfigLayers[Any], before: Any, overrides: Sequence[str]) -> None:
    """Set `dataset.dataset_name` where flags gave a source that `before` had not, and no name."""
    dataset: Any = layers.data.get("dataset")
    source = dataset.get("source") if isinstance(dataset, dict) else None
    if not isinstance(source, dict) or any("dataset_name" in flag for flag in overrides):
        return
    before = before if isinstance(before, dict) else {}
    given, named = _identity(before.get("source")), before.get("dataset_name")
    if _identity(source) == given:
        return
    # A file of one's own may name the data that a flag gives.
    if given is None and named not in (None, DatasetConfig().dataset_name):
        return
    layers.set("dataset.dataset_name", own_name(source, _settings(dataset)), _ORIGIN)


def own_name(source: dict[str, Any], settings: dict[str, Any]) -> str:
    """What `source` is called: a word of it, and a hash of all that it and `settings` say."""
    own = sorted((name, value) for name, value in source.items() if name not in _PATHS)
    identity = _identity(source), own, settings
    digest = xxhash.xxh3_64_hexdigest(repr(identity).encode("utf-8", "surrogateescape"))
    word = str(source.get("name") or next(iter(_paths(source)), "") or source.get("type", "data"))
    word = os.path.basename(word.rstrip("/")).partition(".")[0]
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-")[:_LONGEST]
    return f"{word or 'data'}-{digest[:8]}"


def _settings(dataset: dict[str, Any]) -> dict[str, Any]:
    """What of `dataset` decides its tokens; empty where that cannot be told, which is an error
    soon."""
    config = check(dataset, DatasetConfig).config
    if config is None:
        return {}
    try:
        return dict(named("toolkit.data.prepare.build.settings:settings_of")(config))
    except (ToolkitError, OSError):
        return {}


def _identity(source: Any) -> tuple[Any, ...] | None:
    if not isinstance(source, dict):
        return None
    paths = sorted(
        p if is_url(p) else os.path.abspath(os.path.expanduser(p)) for p in _paths(source)
    )
    return (*(source.get(name) for name in _NAMES), paths)


def _paths(source: dict[str, Any]) -> list[str]:
    """Those that are text; what else stands there is refused when the config is resolved."""
    found = source.get("paths") if "paths" in source else [source.get("path")]
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []
