"""Checks that need torch, yet come before process groups and before anything is written.

Each repeats, cheaply, what a later step would find out too late: after hours of preparing data,
when all ranks are connected, or when the run folder has changed already.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.errors import CheckpointError
from toolkit.experiment.config import ExperimentConfig
from toolkit.runs.files import RUN_FILES

if TYPE_CHECKING:
    from toolkit.data.loader import TrainLoader

# Fields that change how the model is computed, not what its weights mean.
_FREE_MODEL_FIELDS = {"loss_chunk_size", "init_std", "init_scale_residual", "initializer_range"}


def check_optimizer(config: ExperimentConfig) -> None:
    """Check the name patterns of `optim.group_overrides` against the model's parameters.

    Raises:
        ConfigError: a pattern matches no parameter, or a setting is not the optimizer's.
    """
    optim = config.train_module.optim
    if optim.group_overrides:
        model = config.model.build(init_device="meta")
        optim.groups(dict(model.named_parameters()))


def check_continuation(config: ExperimentConfig, folder: Path, train_loader: "TrainLoader") -> None:
    """Check that the run in `folder`, or `trainer.load_path`, can be continued with `config`.

    A checkpoint that cannot be read is passed over here; loading reports it.

    Raises:
        CheckpointError: another model; or `load_path` must hold a checkpoint and does not.
        DataError: other data, or another order of it.
    """
    trainer = config.trainer
    found = _newest(folder / RUN_FILES.checkpoints)
    weights_only = False
    if found is None:
        if trainer.load_strategy == "never" or trainer.load_path is None:
            return
        path = Path(trainer.load_path)
        found = _newest(path) or _newest(path / RUN_FILES.checkpoints) or _read(path)
        if found is None:
            if trainer.load_strategy == "always":
                raise CheckpointError(
                    f"trainer.load_path {path}: holds no valid checkpoint; give a run folder or a "
                    "step{N} folder of one"
                )
            return
        weights_only = trainer.load_weights_only
    checkpoint, model, data = found
    _check_model(checkpoint, model, msgspec.to_builtins(config.model))
    if not weights_only:
        train_loader.load_state_dict(data)


def _newest(root: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    from toolkit.checkpoint.layout import saved_steps, step_folder

    for step in reversed(saved_steps(root)):
        found = _read(step_folder(root, step))
        if found is not None:
            return found
    return None


def _read(checkpoint: Path) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """(checkpoint, model config, state of the data order), or None where it is not readable."""
    from toolkit.checkpoint.commit import load_rank_state
    from toolkit.checkpoint.layout import check_files, read_metadata

    try:
        metadata = read_metadata(checkpoint)
        check_files(checkpoint, metadata)
        state = load_rank_state(checkpoint, rank=0)
    except CheckpointError:
        return None
    return checkpoint, metadata.extra.get("model", {}), state["trainer"]["data"]


def _check_model(checkpoint: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = [
        f"model.{key} (was {saved[key]}, is {value})"
        for key, value in asked.items()
        if key in saved and saved[key] != value and key not in _FREE_MODEL_FIELDS
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint}: was saved from another model: {', '.join(changed)}; set it back, or "
            "start a new run"
        )
