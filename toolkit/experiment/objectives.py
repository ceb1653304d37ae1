"""What `train_module.objective` asks of the rest of an experiment. No torch here."""

from pathlib import Path
from typing import Any

import msgspec

from toolkit.checkpoint.folder import read_metadata
from toolkit.config import ConfigLayers
from toolkit.data.corpus_info import CorpusInfo
from toolkit.data.kinds import check_data_kind
from toolkit.distributed.layout import Layout
from toolkit.errors import CheckpointError, ConfigError, ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load_checks import newest_saved
from toolkit.models.config import ModelConfig, ModuleConfig, TransformerConfig
from toolkit.storage.foreign import guard
from toolkit.storage.remote import is_url
from toolkit.train.adapter_base import check_new_score
from toolkit.train.preference.config import DistillConfig, RewardConfig, WithReference
from toolkit.train.preference.vocabulary import check_same_vocabulary

KEY = "train_module.objective"
_CUTS = {"pp": "pipeline", "tp": "tensor", "cp": "context", "ep": "expert"}


def give_scores(layers: ConfigLayers[Any]) -> None:
    """Give the model of a reward recipe the head that it trains, where nobody has named one."""
    module, model = layers.data.get("train_module"), layers.data.get("model")
    objective = module.get("objective") if isinstance(module, dict) else None
    is_reward = isinstance(objective, dict) and objective.get("type") == "reward"
    if is_reward and isinstance(model, dict) and model.get("num_scores") is None:
        layers.set("model.num_scores", 1, f"{KEY}.type=reward")


def check_objective(config: ExperimentConfig, layout: Layout | None = None) -> None:
    """Check that model, data, adapter and layout suit what is trained for. Raises ConfigError, or
    CheckpointError of a reference or teacher that is there and does not fit."""
    objective, model, found = config.train_module.objective, config.model, ErrorList()
    if isinstance(model, ModuleConfig):
        return
    found.ask(check_objective_data, config)
    is_scored = model.to_transformer().num_scores is not None
    if isinstance(objective, RewardConfig):
        found.ask(_check_reward, config)
    elif is_scored:
        problem = "is of reward models, which train_module.objective.type=reward trains"
        found.add(ConfigError(f"{problem}; leave it out", key="model.num_scores"))
    if isinstance(objective, WithReference):
        found.ask(_check_reference, config, objective)
    if isinstance(objective, DistillConfig):
        found.ask(_check_other_model, config, objective.teacher, f"{KEY}.teacher")
    if objective is not None:
        found.ask(_check_parts, objective, model.to_transformer())
    if objective is not None and layout is not None:
        found.ask(_check_layout, objective, layout)
    found.raise_any()


def check_objective_data(config: ExperimentConfig, corpus: CorpusInfo | None = None) -> None:
    """Check that the data, as its config or its manifests tell, is what is trained on. Raises
    ConfigError."""
    objective = config.train_module.objective
    trains = "a language model" if objective is None else f"{KEY}.type={_name(objective)}"
    unit = None if objective is None else objective.unit
    check_data_kind(config.data, unit, trains=trains, info=corpus)


def _check_reward(config: ExperimentConfig) -> None:
    found, lora = ErrorList(), config.train_module.lora
    if (number := config.model.to_transformer().num_scores) != 1:
        problem = f"a reward model has 1 score, not {number}; set it to 1"
        found.add(ConfigError(problem, key="model.num_scores"))
    if lora is not None and _is_language_model(config.trainer.load_path):
        found.ask(check_new_score, lora)
    callbacks = config.trainer.callbacks
    for name in ("sample_writer", "downstream_evaluator"):
        if getattr(callbacks, name).is_wanted:
            problem = "a reward model writes no text; leave it out"
            found.add(ConfigError(problem, key=f"trainer.callbacks.{name}"))
    found.raise_any()


def _is_language_model(path: str | None) -> bool:
    """Whether a local checkpoint is there, and has no head that gives scores."""
    newest = None if path is None or is_url(path) else newest_saved(Path(path).expanduser())
    model = None if newest is None else read_metadata(newest).extra.get("model")
    return isinstance(model, dict) and model.get("num_scores") is None


def _check_reference(config: ExperimentConfig, objective: Any) -> None:
    key, lora = f"{KEY}.reference_log_probs", config.train_module.lora
    if objective.reference_log_probs == "base":
        if lora is None:
            problem = "base is the model without its adapters, and there are none; use cached"
            raise ConfigError(problem, key=key)
        if lora.train_also or objective.reference is not None:
            other = "train_module.lora.train_also" if lora.train_also else f"{KEY}.reference"
            problem = f"with {other} the model without its adapters is no reference; use cached"
            raise ConfigError(problem, key=key)
    given = objective.reference or config.trainer.load_path
    if given is None or (objective.reference is None and config.trainer.load_strategy == "never"):
        raise ConfigError(
            f"{_name(objective)} starts from a model, which is its reference: name it with --base "
            "or trainer.load_path",
            key=f"{KEY}.reference",
        )
    if objective.reference is not None:
        _check_other_model(config, objective.reference, f"{KEY}.reference")


def _check_other_model(config: ExperimentConfig, path: str, key: str) -> None:
    """Check that a local one is there, and has the same vocabulary."""
    if is_url(path):
        return
    newest = newest_saved(Path(path).expanduser())
    if newest is None:
        problem = "no checkpoint there; give a run, a checkpoint, or what `toolkit convert-hf` made"
        raise ConfigError(f"{path}: {problem}", key=key)
    extra = read_metadata(newest).extra
    check_same_vocabulary(newest, extra, config.model.vocab_size, key=key)


def teacher_parameters(config: ExperimentConfig) -> int:
    """Parameters of the teacher that a model is distilled from; 0 where there is none, or its
    checkpoint is not on this machine."""
    objective = config.train_module.objective
    if not isinstance(objective, DistillConfig) or is_url(objective.teacher):
        return 0
    newest = newest_saved(Path(objective.teacher).expanduser())
    if newest is None:
        return 0
    with guard(newest, CheckpointError):
        return msgspec.convert(read_metadata(newest).extra["model"], ModelConfig).num_parameters


def _check_parts(objective: Any, model: TransformerConfig) -> None:
    """What only the loss of a language model trains."""
    found = ErrorList()
    if model.num_mtp_layers:
        problem = f"{_name(objective)} does not train heads for further tokens; set it to 0"
        found.add(ConfigError(problem, key="model.num_mtp_layers"))
    if model.moe is not None and model.moe.bias_update_rate:
        problem = (
            f"{_name(objective)} does not move biases of experts; set it to 0, which keeps them"
        )
        found.add(ConfigError(problem, key="model.moe.bias_update_rate"))
    found.raise_any()


def _check_layout(objective: Any, layout: Layout) -> None:
    refused = ["pp"]
    if isinstance(objective, RewardConfig):
        refused += ["tp"]
    if isinstance(objective, DistillConfig):
        refused += ["tp", "cp", "ep"]
    for axis in refused:
        if getattr(layout, axis) > 1:
            others = [a for a in ("tp", "cp") if a not in refused]
            works = ", ".join(["ddp, fsdp, hsdp and zero", *(f"{a}_config" for a in others)])
            problem = f"{_name(objective)} does not go with {_CUTS[axis]} parallelism; use {works}"
            raise ConfigError(problem, key=f"train_module.{axis}_config")


def _name(objective: Any) -> str:
    return str(type(objective).__struct_config__.tag)
