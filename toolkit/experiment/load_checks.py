"""Checks of what a run starts from: `trainer.load_path` and what goes with it."""

from pathlib import Path

import msgspec

from toolkit.checkpoint.folder import METADATA_FILE, read_metadata, saved_steps, step_folder
from toolkit.errors import CheckpointError, ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.same_model import check_model
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import is_run
from toolkit.storage.remote import is_url
from toolkit.train.config import TrainerConfig
from toolkit.train.progress import no_checkpoint


def check_load_path(config: ExperimentConfig, folder: Path, *, has_model: bool = True) -> None:
    """Check what can be told without torch of `trainer.load_path`, where the run in `folder` starts
    from there: whether a local one holds a checkpoint if it must, and of which model."""
    trainer, adapts = config.trainer, config.train_module.lora is not None
    path = trainer.load_path
    if newest_saved(folder) or (trainer.callbacks.checkpointer.upload_to and is_run(folder)):
        return  # the run goes on from there
    check_load_options(config)
    if path is None or is_url(path) or (trainer.load_strategy == "never" and not adapts):
        return
    place = Path(path).expanduser()
    newest = newest_saved(place)
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
    if isinstance(saved, dict) and has_model:
        check_model(newest, saved, asked, weights_only=adapts or trainer.load_weights_only)


def newest_saved(path: Path) -> Path | None:
    """The newest committed checkpoint meant by `path`; its files are not looked at."""
    if (path / METADATA_FILE).is_file():
        return path
    for root in (path, path / RUN_FILES.checkpoints):
        if steps := saved_steps(root):
            return step_folder(root, steps[-1])
    return None


def check_load_options(config: ExperimentConfig, *, is_found: bool = False) -> None:
    """Check that what asks for something to be loaded says from where, unless it was found."""
    trainer, defaults = config.trainer, TrainerConfig()
    if is_found or trainer.load_path is not None:
        return
    for name in ("load_weights_only", "load_in_place", "load_key_mapping"):
        if getattr(trainer, name) != getattr(defaults, name):
            raise ConfigError(f"trainer.{name}: there is nothing to load; add trainer.load_path")
    if trainer.load_strategy == "always":
        raise ConfigError("trainer.load_strategy is always: add trainer.load_path")
