"""The trainer's state from checkpoints: which one, and into place."""

import logging
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.checkpoint.anywhere import load_everything, load_weights
from toolkit.checkpoint.find import Found, find_checkpoint, set_aside
from toolkit.checkpoint.remote import find_remote_checkpoint
from toolkit.checkpoint.remote_load import download_newest
from toolkit.errors import CheckpointError, ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import is_url
from toolkit.train.config import TrainerConfig

if TYPE_CHECKING:
    from toolkit.train.trainer import Trainer

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where training starts from."""

    checkpoint: Path | str
    """A folder, or the URL of one that is read in place."""
    weights_only: bool
    rejected: tuple[Path, ...] = ()
    """Checkpoints of this run that are newer, and damaged."""


def find_start(
    config: TrainerConfig,
    own: Path,
    find: Callable[[Path], Found] = find_checkpoint,
    find_remote: Callable[[str], Path | str | None] = lambda url: (
        find_remote_checkpoint(url).checkpoint
    ),
) -> Start | None:
    """The newest valid checkpoint in `own`, the run's folder of them; else of what the run has
    uploaded; else of `trainer.load_path`.

    Raises:
        CheckpointError: `load_strategy` is always and there is nothing to load, or `load_path`
            names a step that is damaged.
    """
    found, rejected = find(own)
    if found is not None:
        return Start(found, weights_only=False, rejected=rejected)
    upload_to = config.callbacks.checkpointer.upload_to
    if upload_to is not None and (uploaded := find_remote(upload_to)) is not None:
        return Start(uploaded, weights_only=False, rejected=rejected)
    if config.load_strategy == "never" or config.load_path is None:
        return None
    if is_url(config.load_path):
        given = find_remote(config.load_path)
    else:
        given = find(Path(config.load_path)).checkpoint
    if given is not None:
        return Start(given, weights_only=config.load_weights_only, rejected=rejected)
    if config.load_strategy == "always":
        raise CheckpointError(
            f"trainer.load_path {config.load_path}: holds no valid checkpoint; give a run folder "
            "or a step{N} folder of one"
        )
    return None


def restore_trainer(trainer: "Trainer") -> Path | str | None:
    """Load what `find_start` finds; every rank calls it.

    Raises:
        CheckpointError: see `find_start`, or it does not fit.
        TrainingError: a remote folder cannot be reached.
    """
    environment, config = trainer.environment, trainer.config
    place: Any = {"rank": environment.rank, "group": environment.cpu_group}

    def find_remote(url: str) -> Path | str | None:
        if url == config.callbacks.checkpointer.upload_to:
            return download_newest(url, trainer.run.path(RUN_FILES.checkpoints), **place)
        if config.load_in_place:
            return find_remote_checkpoint(url, **place).checkpoint
        return download_newest(url, trainer.run.path(RUN_FILES.downloads), **place)

    start = find_start(
        config,
        trainer.run.path(RUN_FILES.checkpoints),
        lambda path: find_checkpoint(path, **place),
        find_remote,
    )
    if start is None:
        return None
    is_own = is_inside(start.checkpoint, trainer.run.path(RUN_FILES.checkpoints))
    mapping = {} if is_own else config.load_key_mapping
    _load(trainer, start.checkpoint, weights_only=start.weights_only, mapping=mapping)
    if is_own:
        trainer.saved_step = trainer.step
    if environment.is_main:
        set_aside(start.rejected)
    return start.checkpoint


def is_inside(checkpoint: Path | str, root: Path) -> bool:
    """Whether `checkpoint` is one of those in the folder `root`."""
    return isinstance(checkpoint, Path) and checkpoint.parent == root


def _load(
    trainer: "Trainer", checkpoint: Path | str, *, weights_only: bool, mapping: Mapping[str, str]
) -> None:
    environment, module = trainer.environment, trainer.train_module
    tensors = renamed(module.state_tensors(), mapping)
    if weights_only:
        weights = {key: t for key, t in tensors.items() if key.startswith("model.")}
        load_weights(checkpoint, weights, environment.cpu_group)
    else:
        metadata, state = load_everything(
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
