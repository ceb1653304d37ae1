"""`--base FOLDER`: the model that an experiment starts from, as a layer of its config."""

from pathlib import Path
from typing import Any

from toolkit.config.files import read_json_mapping
from toolkit.data.corpus_info import data_places
from toolkit.data.tokens.prepared import TOKENIZER_FOLDER
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.runs.files import RUN_FILES

FINETUNE_FILE = "finetune.json"
"""The config that `toolkit convert-hf` writes beside a converted model."""

_LOADING = ("load_path", "load_weights_only", "load_strategy")


def read_base(folder: Path) -> dict[str, Any]:
    """Model, tokenizer and start of the weights in `folder`, as parts of a config.

    Args:
        folder: what `toolkit convert-hf` wrote, or a run.

    Raises:
        ConfigError: it is neither.
    """
    finetune, run = folder / FINETUNE_FILE, folder / RUN_FILES.config
    if finetune.is_file():
        data = read_json_mapping(finetune)
        model, dataset, trainer = (data.get(key, {}) for key in ("model", "dataset", "trainer"))
        loading = {key: trainer[key] for key in _LOADING if key in trainer}
        tokenizer = dataset.get("tokenizer")
    elif run.is_file():
        model, tokenizer = _of_run(read_json_mapping(run), folder)
        loading = {
            "load_path": str(folder.resolve()), "load_weights_only": True, "load_strategy": "always"
        }  # fmt: skip
    else:
        raise ConfigError(
            f"--base {folder}: holds neither {FINETUNE_FILE} nor a run; make it with "
            f"`toolkit convert-hf SRC {folder}`, or give a run folder"
        )
    base: dict[str, Any] = {"model": model, "trainer": loading}
    if tokenizer is not None:
        base["dataset"] = {"tokenizer": tokenizer, "dataset_config": folder.resolve().name}
    return base


def longest_sequence(model: dict[str, Any]) -> int | None:
    """Tokens that the model of a config takes at most; None where it does not say."""
    return model.get("max_sequence_length") or model.get("n_positions")


def _of_run(data: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model of a run, and the tokenizer that its data was made with."""
    from toolkit.config.check import convert
    from toolkit.experiment.load import find_data

    config = find_data(convert(data, ExperimentConfig), folder)
    for place in data_places(config.data):
        tokenizer = place / TOKENIZER_FOLDER
        if tokenizer.is_dir():
            return data["model"], {"type": "hf", "path": str(tokenizer.resolve())}
    tokenizer_config = data.get("dataset", {}).get("tokenizer")
    if (tokenizer_config or {}).get("type") == "bpe":
        raise ConfigError(
            f"--base {folder}: the data it was trained on is not here any more, and its tokenizer "
            f"with it; restore {data_places(config.data)[0]}"
        )
    return data["model"], tokenizer_config
