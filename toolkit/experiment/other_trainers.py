"""Names of other trainers, for whoever comes from one: what is suggested in the place of theirs.

They are no names of ours: what they mean differs in units or defaults. The pages of docs/migrate/
tell how.
"""

import re
from collections.abc import Mapping
from typing import Any

from toolkit.errors import ConfigError

_OPTIM, _SCHEDULER = "train_module.optim", "train_module.scheduler"
_SAVES = "trainer.callbacks.checkpointer"
THEIR_NAMES = {
    "learning_rate": f"{_OPTIM}.lr",
    "optimizer": f"{_OPTIM}.type",
    "optim": f"{_OPTIM}.type",
    "weight_decay": f"{_OPTIM}.weight_decay",
    "adam_beta1": f"{_OPTIM}.betas",
    "adam_beta2": f"{_OPTIM}.betas",
    "adam_epsilon": f"{_OPTIM}.eps",
    "lr_scheduler": f"{_SCHEDULER}.type",
    "lr_scheduler_type": f"{_SCHEDULER}.type",
    "warmup_steps": f"{_SCHEDULER}.warmup",
    "warmup_ratio": f"{_SCHEDULER}.warmup_fraction",
    "max_grad_norm": "train_module.max_grad_norm",
    "micro_batch_size": "train_module.rank_microbatch_size",
    "per_device_train_batch_size": "train_module.rank_microbatch_size",
    "training.local_batch_size": "train_module.rank_microbatch_size",
    "per_device_eval_batch_size": "data_loader.eval_batch_size",
    "gradient_accumulation_steps": "data_loader.global_batch_size",
    "training.global_batch_size": "data_loader.global_batch_size",
    "num_epochs": "trainer.max_duration",
    "num_train_epochs": "trainer.max_duration",
    "max_steps": "trainer.max_duration",
    "training.steps": "trainer.max_duration",
    "sequence_len": "dataset.sequence_length",
    "training.seq_len": "dataset.sequence_length",
    "datasets": "dataset.source",
    "val_set_size": "dataset.validation_fraction",
    "sample_packing": "dataset.instances",
    "dataset_prepared_path": "dataset.root",
    "bf16": "train_module.precision",
    "fp16": "train_module.precision",
    "gradient_checkpointing": "train_module.ac_config.mode",
    "torch_compile": "train_module.compile_model",
    "lora_r": "train_module.lora.rank",
    "lora_alpha": "train_module.lora.alpha",
    "lora_target_modules": "train_module.lora.target_modules",
    "load_in_4bit": "train_module.lora.quantize_base",
    "output_dir": "run.root",
    "logging_steps": "trainer.callbacks.console_logger.interval",
    "eval_steps": "trainer.callbacks.lm_evaluator.interval",
    "save_steps": f"{_SAVES}.interval",
    "save_total_limit": f"{_SAVES}.keep_last",
    "wandb_project": "trainer.callbacks.wandb.project",
}
"""Their field -> ours that has its part."""

_THEIR_VALUES = {
    f"{_OPTIM}.type": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "AdamW"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    },
    f"{_SCHEDULER}.type": {
        "cosine_with_min_lr": "cosine",
        "cosine_warmup": "cosine",
        "warmup_stable_decay": "wsd",
    },
}
"""Our field -> their value -> ours."""

_MARKS = (
    ("axolotl", "docs/migrate/axolotl.md", 2,
     {"base_model", "datasets", "sequence_len", "micro_batch_size", "num_epochs", "val_set_size",
      "lora_r", "sample_packing", "adapter", "rl"}),
    ("the Hugging Face Trainer", "docs/migrate/hf_trainer.md", 2,
     {"per_device_train_batch_size", "num_train_epochs", "output_dir", "learning_rate",
      "lr_scheduler_type", "model_name_or_path", "dataset_name", "gradient_accumulation_steps"}),
    ("torchtitan", "docs/migrate/torchtitan.md", 2,
     {"job", "training", "parallelism", "optimizer", "lr_scheduler", "activation_checkpoint"}),
)  # fmt: skip
"""Trainer, page, and how many of these names at the top of a file are enough."""
_HF_MODEL = {"architectures", "model_type", "transformers_version"}
_HINT = re.compile(r"; (did you mean [^;]*\?|known: .*)\Z")


def check_not_theirs(data: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError where the file `source` is a config of another trainer, with the page that
    tells what becomes of it."""
    if len(_HF_MODEL & data.keys()) > 1:
        raise ConfigError(
            f"{source}: describes a model of transformers, not a run; `toolkit convert-hf FOLDER "
            "OUT` brings it in with a config to train it (docs/migrate/hf_trainer.md)"
        )
    for trainer, page, enough, marks in _MARKS:
        if len(marks & data.keys()) >= enough and "train_module" not in data:
            raise ConfigError(
                f"{source}: a config of {trainer}; {page} says what its fields are here, and "
                "`toolkit init` writes a config to put them in"
            )


def with_our_name(error: ConfigError, data: Mapping[str, Any], path: str = "") -> ConfigError:
    """`error`, about a name or value of a config that holds `data`, or about the flag `path`,
    suggesting what is meant where it is another trainer's."""
    value: Any = data
    for name in error.key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    ours = None
    if error.problem.startswith("no such field"):
        ours = THEIR_NAMES.get(path or error.key)
        if ours is None and path in ("", error.key):
            ours = THEIR_NAMES.get(error.key.rpartition(".")[2])
    elif isinstance(value, str):
        ours = _THEIR_VALUES.get(error.key, {}).get(value)
    if ours is not None:
        problem, _, origin = error.problem.partition(" (in ")
        origin = f" (in {origin}" if origin else ""
        error.args = (f"{_HINT.sub('', problem)}; did you mean {ours!r}?{origin}",)
    return error
