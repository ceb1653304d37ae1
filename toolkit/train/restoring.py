"""The trainer's state from checkpoints: which one, and into place."""

import logging
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.checkpoint.commit import load_checkpoint
from toolkit.checkpoint.find import Found, find_checkpoint, set_aside
from toolkit.checkpoint.layout import TENSORS_FOLDER
from toolkit.checkpoint.tensors import load_tensors
from toolkit.errors import CheckpointError, ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.train.config import TrainerConfig

if TYPE_CHECKING:
    from toolkit.train.trainer import Trainer

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where training starts from."""

    checkpoint: Path
    weights_only: bool
    rejected: tuple[Path, ...] = ()
    """Checkpoints of this run that are newer, and damaged."""


def find_start(
    config: TrainerConfig, own: Path, find: Callable[[Path], Found] = find_checkpoint
) -> Start | None:
    """The newest valid checkpoint in `own`, the run's folder of them, else `trainer.load_path`.

    Raises:
        CheckpointError: `load_strategy` is always and there is nothing to load, or `load_path`
            names a step that is damaged.
    """
    found, rejected = find(own)
    if found is not None:
        return Start(found, weights_only=False, rejected=rejected)
    if config.load_strategy == "never" or config.load_path is None:
        return None
    given = find(Path(config.load_path)).checkpoint
    if given is not None:
        return Start(given, weights_only=config.load_weights_only, rejected=rejected)
    if config.load_strategy == "always":
        raise CheckpointError(
            f"trainer.load_path {config.load_path}: holds no valid checkpoint; give a run folder "
            "or a step{N} folder of one"
        )
    return None


def restore_trainer(trainer: "Trainer") -> Path | None:
    """Load what `find_start` finds; every rank calls it.

    Raises:
        CheckpointError: see `find_start`, or it does not fit.
    """
    environment = trainer.environment
    own = trainer.run.path(RUN_FILES.checkpoints)
    start = find_start(
        trainer.config,
        own,
        lambda path: find_checkpoint(path, rank=environment.rank, group=environment.cpu_group),
    )
    if start is None:
        return None
    _load(trainer, start.checkpoint, weights_only=start.weights_only)
    if start.checkpoint.parent == own:
        trainer.saved_step = trainer.step
    if environment.is_main:
        set_aside(start.rejected)
    return start.checkpoint


def _load(trainer: "Trainer", checkpoint: Path, *, weights_only: bool) -> None:
    environment, module = trainer.environment, trainer.train_module
    tensors = module.state_tensors()
    if checkpoint.parent != trainer.run.path(RUN_FILES.checkpoints):  # its own has its own names
        tensors = renamed(tensors, trainer.config.load_key_mapping)
    if weights_only:
        weights = {key: t for key, t in tensors.items() if key.startswith("model.")}
        load_tensors(checkpoint / TENSORS_FOLDER, weights, environment.cpu_group)
    else:
        metadata, state = load_checkpoint(
            checkpoint, tensors=tensors, rank=environment.rank, group=environment.cpu_group
        )
        trainer.load_state_dict(state["trainer"])
        if metadata.world_size == environment.world_size:
            _set_rng_state(state["rng"])
    module.state_filled()
    log.info("loaded %s (step %d)", checkpoint, trainer.step)


def renamed(
    tensors: dict[str, torch.Tensor], mapping: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """`tensors` (`model.<name>`, `optim.<name>.<key>`) under the names a checkpoint has.

    Args:
        mapping: regular expression over this model's parameter names -> replacement, in which `\\1`
            is the first group; applied in order.

    Raises:
        ConfigError: a pattern is not a regular expression or matches no parameter, or two tensors
            get one name.
    """
    result = dict(tensors)
    for pattern, replacement in mapping.items():
        try:
            expression = re.compile(pattern)
            changed = {key: _rename(key, expression, replacement) for key in result}
        except re.error as error:
            raise ConfigError(
                f"trainer.load_key_mapping: {pattern!r} -> {replacement!r}: {error}"
            ) from None
        if all(old == new for old, new in changed.items()):
            raise ConfigError(
                f"trainer.load_key_mapping: {pattern!r} changes the name of no parameter"
            )
        if len(set(changed.values())) < len(changed):
            raise ConfigError(f"trainer.load_key_mapping: {pattern!r} gives two tensors one name")
        result = {changed[key]: tensor for key, tensor in result.items()}
    return result


def _rename(key: str, expression: re.Pattern[str], replacement: str) -> str:
    kind, _, name = key.partition(".")
    suffix = ""
    if kind == "optim":
        name, dot, slot = name.rpartition(".")
        suffix = dot + slot
    return f"{kind}.{expression.sub(replacement, name)}{suffix}"


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), None))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
