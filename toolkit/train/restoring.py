"""The trainer's state from checkpoints: which one, and into place."""

import logging
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from toolkit.checkpoint.anywhere import load_everything, load_weights, metadata_of
from toolkit.checkpoint.find import Found, find_checkpoint, set_aside
from toolkit.checkpoint.layout import MODEL_PREFIX
from toolkit.checkpoint.remote import find_remote_checkpoint
from toolkit.checkpoint.remote_load import download_newest
from toolkit.errors import CheckpointError, ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import is_url
from toolkit.train.base import check_adapter, describe_base, find_base
from toolkit.train.config import NO_BASE, TrainerConfig, no_checkpoint

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
    base: Path | str | None = None
    """Of an adapter: the checkpoint that holds the rest of the model."""


def find_start(
    config: TrainerConfig,
    own: Path,
    find: Callable[[Path], Found] = find_checkpoint,
    find_remote: Callable[[str], Path | str | None] = lambda url: (
        find_remote_checkpoint(url).checkpoint
    ),
    *,
    adapts: bool = False,
) -> Start | None:
    """The newest valid checkpoint in `own`, the run's folder of them; else of what the run has
    uploaded; else of `trainer.load_path`.

    Args:
        adapts: the run trains an adapter on the model in `load_path`.

    Raises:
        CheckpointError: `load_strategy` is always, or the run adapts, and there is nothing to load;
            `load_path` names a step that is damaged; or it is not the base of the run's adapter.
    """

    def look(path: str) -> Path | str | None:
        return find_remote(path) if is_url(path) else find(Path(path)).checkpoint

    newest, rejected = find(own)
    found: Path | str | None = newest
    upload_to = config.callbacks.checkpointer.upload_to
    if found is None and upload_to is not None:
        found = find_remote(upload_to)
    if found is not None:
        base = find_base(found, config.load_path, look) if adapts else None
        return Start(found, weights_only=False, rejected=rejected, base=base)
    if config.load_strategy == "never" or config.load_path is None:
        if adapts:
            raise CheckpointError(NO_BASE)
        return None
    given = look(config.load_path)
    if given is not None:
        return Start(given, weights_only=adapts or config.load_weights_only, rejected=rejected)
    if config.load_strategy == "always" or adapts:
        raise CheckpointError(no_checkpoint(config.load_path))
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
        adapts=trainer.train_module.adapter_config is not None,
    )
    if start is None:
        return None
    is_own = is_inside(start.checkpoint, trainer.run.path(RUN_FILES.checkpoints))
    mapping = {} if is_own else config.load_key_mapping
    _load(trainer, start, mapping=mapping)
    if is_own:
        trainer.saved_step = trainer.step
    if environment.is_main:
        set_aside(start.rejected)
    return start.checkpoint


def is_inside(checkpoint: Path | str, root: Path) -> bool:
    """Whether `checkpoint` is one of those in the folder `root`."""
    return isinstance(checkpoint, Path) and checkpoint.parent == root


def _load(trainer: "Trainer", start: Start, *, mapping: Mapping[str, str]) -> None:
    environment, module = trainer.environment, trainer.train_module
    checkpoint, group = start.checkpoint, environment.cpu_group
    base_weights = module.base_tensors()
    if base_weights:
        _load_base(trainer, start, base_weights)
    if not start.weights_only:
        tensors = renamed(module.state_tensors(), mapping)
        metadata, state = load_everything(
            checkpoint, tensors=tensors, rank=environment.rank, group=group
        )
        trainer.load_state_dict(state["trainer"])
        module.origin = metadata.extra.get("source")
        if metadata.world_size == environment.world_size:
            _set_rng_state(state["rng"])
    elif not base_weights:
        tensors = renamed(module.state_tensors(), mapping)
        weights = {key: t for key, t in tensors.items() if key.startswith(MODEL_PREFIX)}
        load_weights(checkpoint, weights, group)
        module.origin = metadata_of(checkpoint).extra.get("source")
    module.state_filled()
    log.info("loaded %s (step %d)", checkpoint, trainer.step)


def _load_base(trainer: "Trainer", start: Start, weights: dict[str, torch.Tensor]) -> None:
    """Fill what the run's own checkpoints do not hold."""
    base = start.checkpoint if start.weights_only else start.base
    assert base is not None, "adapters are loaded with their base"
    module = trainer.train_module
    check_adapter(base, metadata_of(base), module.adapter_config, weights_only=True)
    load_weights(
        base, renamed(weights, trainer.config.load_key_mapping), trainer.environment.cpu_group
    )
    module.base = describe_base(base)


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
