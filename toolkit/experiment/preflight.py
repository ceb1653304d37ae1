"""Checks that come before process groups and before anything is written; what can be told without
torch, before torch is imported.

Each repeats, cheaply, what a later step would find out too late: after hours of preparing data,
when all ranks are connected, or when the run folder has changed already.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.checkpoint.folder import METADATA_FILE, read_metadata, saved_steps, step_folder
from toolkit.data.corpus_info import datasets_of, read_corpus
from toolkit.data.prepare.text.presence import check_presence
from toolkit.errors import BadInputError, CheckpointError, ConfigError, ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import is_run
from toolkit.storage.remote import is_url
from toolkit.train.config import TrainerConfig
from toolkit.train.load_path import no_checkpoint

READ_EARLY_BYTES = 16 << 30

if TYPE_CHECKING:
    from toolkit.checkpoint.find import Found
    from toolkit.data.loader import TrainLoader
    from toolkit.models.freeze import TrainedParameters
    from toolkit.train.restoring import Start

# Fields that change how the model is computed, not what its weights mean.
_FREE_MODEL_FIELDS = frozenset(
    {"loss_chunk_size", "init_std", "init_scale_residual", "initializer_range"}
)
# Longer context from the same weights: a new run may change these. Shapes are checked on loading.
_FREE_FOR_WEIGHTS = _FREE_MODEL_FIELDS | {
    "rope_theta", "rope_scaling", "sliding_rope_theta", "max_sequence_length"
}  # fmt: skip


def check_data_files(config: ExperimentConfig) -> None:
    """Check the local files that text which is not prepared yet would come from.

    Raises:
        DataError, ConfigError: one is missing, or the mixture makes no sense.
    """
    corpus, found = None, ErrorList()
    with contextlib.suppress(BadInputError):
        corpus = read_corpus(config.data)
    with found.collecting():
        for dataset in datasets_of(config.data):
            with found.collecting():
                check_presence(dataset, is_prepared=corpus is not None)
    found.raise_any()


def check_load_path(config: ExperimentConfig, folder: Path, *, has_model: bool = True) -> None:
    """Check what can be told without torch of `trainer.load_path`, where the run in `folder` starts
    from there: whether a local one holds a checkpoint if it must, and of which model.

    Args:
        has_model: the model is the one that is meant.

    Raises:
        CheckpointError: it holds none, or one of another model.
        ConfigError: see `check_load_options`.
    """
    trainer, adapts = config.trainer, config.train_module.lora is not None
    path = trainer.load_path
    if _newest(folder) or (trainer.callbacks.checkpointer.upload_to and is_run(folder)):
        return  # the run goes on from there
    check_load_options(config, None)
    if path is None or is_url(path) or (trainer.load_strategy == "never" and not adapts):
        return
    place = Path(path).expanduser()
    newest = _newest(place)
    if newest is None:
        if trainer.load_strategy != "if_available" or adapts:
            raise CheckpointError(no_checkpoint(path))
        return
    try:
        saved = read_metadata(newest).extra.get("model")
    except CheckpointError:
        if newest == place:
            raise
        return  # an older one may be whole
    asked = msgspec.json.decode(msgspec.json.encode(config.model))  # lists, as stored
    free = _FREE_FOR_WEIGHTS if adapts or trainer.load_weights_only else _FREE_MODEL_FIELDS
    if isinstance(saved, dict) and has_model:
        _check_model(newest, saved, asked, free=free)


def _newest(path: Path) -> Path | None:
    """The newest committed checkpoint meant by `path`; its files are not looked at."""
    if (path / METADATA_FILE).is_file():
        return path
    for root in (path, path / RUN_FILES.checkpoints):
        if steps := saved_steps(root):
            return step_folder(root, steps[-1])
    return None


def check_continuation(config: ExperimentConfig, folder: Path, train_loader: "TrainLoader") -> None:
    """Check that the run in `folder`, or `trainer.load_path`, can be continued with `config`.

    Raises:
        ConfigError: a source of a mixture would be repeated more than it may be.
        CheckpointError: another model or optimizer; or `load_path` must hold a checkpoint and does
            not.
        DataError: other data, or another order of it.
    """
    from toolkit.train.restoring import find_start, reached_by

    start = find_start(
        config.trainer,
        folder / RUN_FILES.checkpoints,
        _look,
        adapts=config.train_module.lora is not None,
        reached=reached_by(config.trainer, folder),
    )
    check_load_options(config, start)
    if start is not None:
        for check in continuation_checks(config, folder, start, train_loader):
            check()
    check_repetitions(config, train_loader)


def check_repetitions(config: ExperimentConfig, train_loader: "TrainLoader") -> None:
    """Check that the run, to its end, repeats no source of a mixture more than it may be; after
    `continuation_checks`, which tell the loader where it goes on.

    Raises:
        ConfigError: one is repeated more.
    """
    trainer = config.trainer
    limits = [trainer.max_duration, *([trainer.hard_stop] if trainer.hard_stop else [])]
    train_loader.check_repetitions(
        min(train_loader.steps_of(limit.value, limit.unit) for limit in limits)
    )


def _look(path: Path) -> "Found":
    """The newest checkpoint in `path`. What this process reads in seconds is read: a run that is
    refused because of it has not been touched yet."""
    from toolkit.checkpoint.find import find_checkpoint
    from toolkit.checkpoint.folder import read_metadata

    found = find_checkpoint(path, quick=True)
    if found.checkpoint is None:
        return found
    size = sum(entry.size for entry in read_metadata(found.checkpoint).files.values())
    return find_checkpoint(path, report=False) if size <= READ_EARLY_BYTES else found


def check_load_options(config: ExperimentConfig, start: "Start | None") -> None:
    """Check that what asks for something to be loaded says from where.

    Raises:
        ConfigError: training would start from fresh weights all the same.
    """
    trainer, defaults = config.trainer, TrainerConfig()
    if start is not None or trainer.load_path is not None:
        return
    for name in ("load_weights_only", "load_in_place", "load_key_mapping"):
        if getattr(trainer, name) != getattr(defaults, name):
            raise ConfigError(f"trainer.{name}: there is nothing to load; add trainer.load_path")
    if trainer.load_strategy == "always":
        raise ConfigError("trainer.load_strategy is always: add trainer.load_path")


def continuation_checks(
    config: ExperimentConfig, folder: Path, start: "Start", train_loader: "TrainLoader"
) -> list[Callable[[], None]]:
    """The checks of `check_continuation`, for who wants to know all that is wrong with going on
    from `start`."""
    from toolkit.checkpoint.folder import rank_file
    from toolkit.checkpoint.load import metadata_of, rank_state_of, shapes_of
    from toolkit.checkpoint.tensors import check_shapes
    from toolkit.train.adapter_base import check_adapter
    from toolkit.train.restoring import is_inside, renamed, usable_state

    checkpoint, lora = start.checkpoint, config.train_module.lora
    metadata = metadata_of(checkpoint)
    saved = metadata.extra
    model = msgspec.json.decode(msgspec.json.encode(config.model))  # lists, as stored
    free = _FREE_FOR_WEIGHTS if start.weights_only else _FREE_MODEL_FIELDS

    def check_data() -> None:
        # Every rank will read its own.
        for rank in range(1, min(metadata.world_size, len(metadata.files))):
            if rank_file(rank) in metadata.files:
                rank_state_of(checkpoint, rank)
        with usable_state(checkpoint):
            train_loader.load_state_dict(rank_state_of(checkpoint, rank=0)["trainer"]["data"])

    def check_model() -> None:
        if not isinstance(saved.get("model"), dict):
            raise CheckpointError(f"{checkpoint}: does not say which model it is of")
        _check_model(checkpoint, saved["model"], model, free=free)
        own = is_inside(checkpoint, folder / RUN_FILES.checkpoints)
        mapping = {} if own else config.trainer.load_key_mapping
        wanted = _weights(config, is_base=start.weights_only)
        check_shapes(checkpoint, shapes_of(checkpoint), renamed(wanted, mapping))
        if start.base is not None:
            weights = renamed(_weights(config, is_base=True), config.trainer.load_key_mapping)
            check_shapes(start.base, shapes_of(start.base), weights)

    checks = [
        lambda: check_adapter(checkpoint, metadata, lora, weights_only=start.weights_only),
        check_model,
    ]
    if not start.weights_only:
        checks += [lambda: _check_optimizer_type(checkpoint, saved, config), check_data]
    return checks


def changed_training(config: ExperimentConfig, start: "Start") -> list[str]:
    """What `change_of_training` tells of going on from `start` with this config."""
    from toolkit.checkpoint.load import shapes_of
    from toolkit.train.moments import change_of_training

    if start.weights_only:
        return []
    infos = _parameters(config).infos
    trained = {name for name, info in infos.items() if info.is_trained}
    return change_of_training(shapes_of(start.checkpoint), trained)


def _weights(config: ExperimentConfig, *, is_base: bool) -> dict[str, Any]:
    """Meta tensors of the weights that a checkpoint of this model holds, by their stored names; of
    an adapter's, those of its base or its own."""
    from toolkit.checkpoint.folder import MODEL_PREFIX
    from toolkit.models.lora import is_trained
    from toolkit.models.parameters import is_adapter

    lora = config.train_module.lora
    return {
        f"{MODEL_PREFIX}{name}": info
        for name, info in _parameters(config).infos.items()
        if lora is None or (not is_adapter(name) if is_base else is_trained(name, lora))
    }


def _parameters(config: ExperimentConfig) -> "TrainedParameters":
    from toolkit.models.freeze import choose_trained

    module = config.train_module
    model = config.model.build(init_device="meta")
    return choose_trained(model, freeze=module.freeze, lora=module.lora)


def _check_model(
    checkpoint: Path | str, saved: dict[str, Any], asked: dict[str, Any], *, free: frozenset[str]
) -> None:
    changed = [
        f"model.{key} (was {saved[key]}, is {value})"
        for key, value in asked.items()
        if key in saved and saved[key] != value and key not in free
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint}: was saved from another model: {', '.join(changed)}; set it back, or "
            "start a new run"
        )


def _check_optimizer_type(
    checkpoint: Path | str, saved: dict[str, Any], config: ExperimentConfig
) -> None:
    asked = msgspec.to_builtins(config.train_module.optim)["type"]
    before = saved.get("optim", {}).get("type", asked)
    if before != asked:
        raise CheckpointError(
            f"{checkpoint}: holds the state of another optimizer: train_module.optim.type (was "
            f"{before}, is {asked}); set it back, or start a new run with trainer.load_path and "
            "trainer.load_weights_only=true"
        )
