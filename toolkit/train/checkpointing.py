"""The trainer's state to and from checkpoints."""

import importlib.metadata
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from toolkit.checkpoint.commit import load_checkpoint, save_checkpoint
from toolkit.checkpoint.find import Found, find_checkpoint, set_aside
from toolkit.checkpoint.layout import HF_FOLDER, TENSORS_FOLDER
from toolkit.checkpoint.ranks import run_together
from toolkit.checkpoint.tensors import iterate_tensors, load_tensors
from toolkit.errors import CheckpointError, RunError
from toolkit.runs.files import RUN_FILES
from toolkit.train.config import TrainerConfig

if TYPE_CHECKING:
    from toolkit.train.trainer import Trainer

log = logging.getLogger(__name__)

_VERSIONED = ("torch", "accelerate", "deepspeed", "numpy")


def save_trainer(trainer: "Trainer", *, export_hf: bool = False) -> Path:
    """Commit a checkpoint of the current step; every rank calls it.

    Metrics of all steps so far are on disk before the checkpoint exists.

    Raises:
        RunError: another process has taken the run over; nothing is written.
        TrainingError: it could not be written; the checkpoints before it are as they were.
    """
    environment = trainer.environment
    _check_owner(trainer)
    run_together(
        trainer.recorder.flush,
        environment.cpu_group,
        failing=f"{trainer.run.folder}: metrics cannot be written",
    )
    module = trainer.train_module
    folder = save_checkpoint(
        trainer.run.path(RUN_FILES.checkpoints),
        step=trainer.step,
        tokens=trainer.tokens,
        tensors=module.state_tensors(),
        rank_state={"trainer": trainer.state_dict(), "rng": _rng_state()},
        engine=environment.engine.name,
        rank=environment.rank,
        group=environment.cpu_group,
        extra={
            "model": msgspec.to_builtins(module.model_config),
            "optim": msgspec.to_builtins(module.optim_config),
            "data_fingerprint": trainer.train_loader.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        },
        export=(lambda unfinished: _export_hf(trainer, unfinished)) if export_hf else None,
    )
    trainer.saved_step = trainer.step
    trainer.run.set_status("running", step=trainer.step, tokens=trainer.tokens)
    log.info("checkpoint: %s", folder)
    return folder


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


def _check_owner(trainer: "Trainer") -> None:
    """A process that was suspended and lost the run must not touch what its new owner writes."""
    refusal: RunError | None = None
    try:
        trainer.run.check_owner()
    except RunError as error:
        refusal = error
    refusal = trainer.environment.broadcast(refusal)
    if refusal is not None:
        raise refusal


def _load(trainer: "Trainer", checkpoint: Path, *, weights_only: bool) -> None:
    environment, module = trainer.environment, trainer.train_module
    tensors = module.state_tensors()
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


def _export_hf(trainer: "Trainer", unfinished: Path) -> None:
    """Safetensors for `transformers`, read back from the tensors just written, one at a time."""
    from toolkit.hf.export import export_hf, hf_architecture

    config = trainer.train_module.model_config
    if hf_architecture(config) is None:
        log.info("no transformers class has these parts; %s/ is not written", HF_FOLDER)
        return
    tokenizer = trainer.train_loader.tokenizer_folder
    export_hf(
        config,
        iterate_tensors(unfinished / TENSORS_FOLDER, "model."),
        unfinished / HF_FOLDER,
        tokenizer_folder=tokenizer if tokenizer is not None and tokenizer.is_dir() else None,
    )


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": list(random.getstate()[1]), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), None))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
