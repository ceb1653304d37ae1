"""`--base FOLDER`: the model that an experiment starts from, as a layer of its config."""

import re
from pathlib import Path
from typing import Any

from toolkit.checkpoint.folder import METADATA_FILE
from toolkit.config.files import read_json_mapping
from toolkit.config.interpolation import fill
from toolkit.data.corpus_info import data_places
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recipes import recipe_names
from toolkit.experiment.run_data import find_data
from toolkit.models.presets import PRESETS
from toolkit.runs.files import RUN_FILES

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

FINETUNE_FILE = "finetune.json"
"""The config that `toolkit convert-hf` writes beside a converted model."""


def read_base(folder: Path) -> dict[str, Any]:
    """Model, tokenizer and start of the weights in `folder`, as parts of a config.

    Args:
        folder: what `toolkit convert-hf` wrote, or a run.

    Raises:
        ConfigError: it is neither.
    """
    if (folder / FINETUNE_FILE).is_file():
        model, dataset = _of_converted(read_json_mapping(folder / FINETUNE_FILE), folder)
    elif (folder / RUN_FILES.config).is_file():
        model, dataset = _of_run(read_json_mapping(folder / RUN_FILES.config), folder)
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
    """Tokens that the model of a config takes at most; None where it does not say."""
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
    from toolkit.config.check import convert

    config, dataset = find_data(fill(convert(data, ExperimentConfig)), folder), _of_dataset(data)
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
