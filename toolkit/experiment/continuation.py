"""Whether a checkpoint can be continued with a config: checked before process groups exist, and
before the run folder changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from toolkit.checkpoint.find import Found, find_checkpoint
from toolkit.checkpoint.folder import MODEL_PREFIX, rank_file, read_metadata
from toolkit.checkpoint.load import load_rank_state, shapes_of
from toolkit.checkpoint.tensors import check_shapes
from toolkit.data.loader import TrainLoader
from toolkit.errors import CheckpointError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load_checks import check_load_options
from toolkit.experiment.same_model import check_model
from toolkit.models.config import ModuleConfig
from toolkit.models.lora import choose_trained
from toolkit.models.parameters import (
    ParameterInfo,
    TrainedParameters,
    is_adapter,
    is_trained,
)
from toolkit.models.shapes import state_shapes
from toolkit.runs.files import RUN_FILES
from toolkit.train.adapter_base import check_adapter
from toolkit.train.matching import change_of_training, renamed, without_new_head
from toolkit.train.restoring import Start, find_start, is_inside, reached_by, usable_state
from toolkit.train.timeline import Timeline

READ_EARLY_BYTES = 16 << 30


def check_continuation(config: ExperimentConfig, folder: Path, train_loader: TrainLoader) -> None:
    """Check that the run in `folder`, or `trainer.load_path`, can be continued with `config`."""
    start = start_of(config, folder, _look)
    check_load_options(config, is_found=start is not None)
    if start is not None:
        for check in continuation_checks(config, folder, start, train_loader):
            check()
    check_repetitions(config, train_loader)


def start_of(
    config: ExperimentConfig, folder: Path, find: Callable[[Path], Found] = find_checkpoint
) -> Start | None:
    return find_start(
        config.trainer,
        folder / RUN_FILES.checkpoints,
        find,
        adapts=config.train_module.lora is not None,
        reached=reached_by(config.trainer, folder),
    )


def check_repetitions(config: ExperimentConfig, train_loader: TrainLoader) -> None:
    """Check that the run, to its end, repeats no source of a mixture more than it may be; after
    `continuation_checks`, which tell the loader where it goes on."""
    train_loader.check_repetitions(
        Timeline.of(config.trainer, train_loader.batches.steps_of).stop_step
    )


def _look(path: Path) -> Found:
    """The newest checkpoint in `path`. What this process reads in seconds is read: a run that is
    refused because of it has not been touched yet."""
    found = find_checkpoint(path, quick=True)
    if found.checkpoint is None:
        return found
    size = sum(entry.size for entry in read_metadata(found.checkpoint).files.values())
    return find_checkpoint(path, report=False) if size <= READ_EARLY_BYTES else found


def continuation_checks(
    config: ExperimentConfig, folder: Path, start: Start, train_loader: TrainLoader | None
) -> list[Callable[[], None]]:
    """The checks of going on from `start`, one by one, for who wants to know all that is wrong.
    Without a `train_loader`, data that is not there yet, any position in it is right."""
    checkpoint, lora = start.checkpoint, config.train_module.lora
    metadata = read_metadata(checkpoint)
    saved = metadata.extra
    model = msgspec.json.decode(msgspec.json.encode(config.model))  # lists, as stored

    def check_data() -> None:
        # Every rank will read its own.
        for rank in range(1, min(metadata.world_size, len(metadata.files))):
            if rank_file(rank) in metadata.files:
                load_rank_state(checkpoint, rank)
        with usable_state(checkpoint):
            state = data_state(start)
            if train_loader is not None:
                train_loader.load_state_dict(state)

    def check_weights() -> None:
        if not isinstance(saved.get("model"), dict):
            raise CheckpointError(f"{checkpoint}: does not say which model it is of")
        check_model(checkpoint, saved["model"], model, weights_only=start.weights_only)
        if isinstance(config.model, ModuleConfig):
            return
        own = is_inside(checkpoint, folder / RUN_FILES.checkpoints)
        mapping = {} if own else config.trainer.load_key_mapping
        wanted, stored = _weights(config, is_base=start.weights_only), shapes_of(checkpoint)
        if start.weights_only:
            wanted = without_new_head(wanted, stored)
        check_shapes(checkpoint, stored, renamed(wanted, mapping))
        if start.base is not None:
            stored = shapes_of(start.base)
            weights = without_new_head(_weights(config, is_base=True), stored)
            mapping = config.trainer.load_key_mapping
            check_shapes(start.base, stored, renamed(weights, mapping))

    checks = [
        lambda: check_adapter(checkpoint, metadata, lora, weights_only=start.weights_only),
        check_weights,
    ]
    if not start.weights_only:
        checks += [lambda: _check_optimizer_type(checkpoint, saved, config), check_data]
    return checks


def data_state(start: Start) -> dict[str, Any]:
    """The position in the data that a checkpoint keeps; see `TrainLoader.state_dict`."""
    return dict(load_rank_state(start.checkpoint, rank=0)["trainer"]["data"])


def changed_training(config: ExperimentConfig, start: Start) -> list[str]:
    if start.weights_only or isinstance(config.model, ModuleConfig):
        return []
    infos = _parameters(config).infos
    trained = {name for name, info in infos.items() if info.is_trained}
    return change_of_training(shapes_of(start.checkpoint), trained)


def _weights(config: ExperimentConfig, *, is_base: bool) -> dict[str, Any]:
    """Meta tensors of the weights that a checkpoint of this model holds, by their stored names; of
    an adapter's, those of its base or its own."""
    lora = config.train_module.lora
    infos = _parameters(config).infos
    shapes = state_shapes(config.model.to_transformer())
    kept = {name: ParameterInfo(shapes[name], is_trained=False) for name in shapes.keys() - infos}
    return {
        f"{MODEL_PREFIX}{name}": info
        for name, info in (infos | kept).items()
        if lora is None or (not is_adapter(name) if is_base else is_trained(name, lora))
    }


def _parameters(config: ExperimentConfig) -> TrainedParameters:
    module = config.train_module
    model = config.model.build(init_device="meta")
    return choose_trained(model, freeze=module.freeze, lora=module.lora)


def _check_optimizer_type(
    checkpoint: Path | str, saved: dict[str, Any], config: ExperimentConfig
) -> None:
    optim = msgspec.to_builtins(config.train_module.optim)
    for field, default in (("type", optim["type"]), ("state_dtype", "fp32")):
        asked = optim.get(field, default)
        before = saved.get("optim", {}).get(field, default)
        if before != asked:
            raise CheckpointError(
                f"{checkpoint}: holds the state of another optimizer: train_module.optim.{field} "
                f"(was {before}, is {asked}); set it back, or start a new run with "
                "trainer.load_path and trainer.load_weights_only=true"
            )
