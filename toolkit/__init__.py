"""A training toolkit for language models on PyTorch, Accelerate and DeepSpeed.

`from toolkit import NAME` is the Python API: every name of `__all__`, each imported when it is
first asked for. `import toolkit` imports no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "cli.script": ("main",),
    "config.base": ("Config",),
    "data.config": ("DataConfig", "DataLoaderConfig", "DatasetConfig"),
    "data.evaluation": ("EvalLoader",),
    "data.loader": ("TrainLoader", "get_dataloaders"),
    "data.prepare.build.prepare": ("ensure_prepared", "prepare_dataset"),
    "data.prepare.tokenizers.tokenizer": ("Tokenizer", "load_tokenizer"),
    "data.tokens.prepared": ("PreparedDataset", "check_vocabulary", "read_prepared"),
    "distributed.environment": ("TrainingEnvironment", "prepare_training_environment"),
    "errors": ("ToolkitError",),
    "experiment.config": ("ExperimentConfig",),
    "experiment.load": ("load_experiment",),
    "models.config": ("GPTConfig", "TransformerConfig"),
    "models.transformer": ("GPTModel", "Transformer"),
    "runs.files": ("RUN_FILES",),
    "runs.manager": ("RunManager",),
    "runs.registry": ("start_run",),
    "train.basic": ("BasicTrainModule",),
    "train.callbacks.base": ("Callback",),
    "train.callbacks.config": ("CallbacksConfig",),
    "train.config": ("Duration", "TrainerConfig", "TransformerTrainModuleConfig"),
    "train.module": ("Metric", "Progress", "TrainModule"),
    "train.state": ("TrainState",),
    "train.trainer": ("TrainResult", "Trainer"),
    "train.transformer": ("TransformerTrainModule",),
}
_MODULES = {name: f"toolkit.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Most names need torch, which reads what this sets when it is loaded.
    importlib.import_module("toolkit.distributed.tuning").set_defaults()
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
