"""The trainer's state to and from checkpoints."""

import importlib.metadata
import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from toolkit.checkpoint.commit import load_checkpoint, save_checkpoint
from toolkit.checkpoint.layout import HF_FOLDER, TENSORS_FOLDER, find_latest, locate
from toolkit.checkpoint.tensors import iterate_tensors, load_tensors
from toolkit.errors import CheckpointError
from toolkit.runs.files import RUN_FILES

if TYPE_CHECKING:
    from toolkit.train.trainer import Trainer

log = logging.getLogger(__name__)

_VERSIONED = ("torch", "accelerate", "deepspeed", "numpy")


def save_trainer(trainer: "Trainer", *, export_hf: bool = False) -> Path:
    """Commit a checkpoint of the current step; every rank calls it.

    Metrics of all steps so far are on disk before the checkpoint exists.
    """
    trainer.recorder.flush()
    environment = trainer.environment
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
            "data_fingerprint": trainer.train_loader.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        },
        export=(lambda unfinished: _export_hf(trainer, unfinished)) if export_hf else None,
    )
    trainer.run.set_status("running", step=trainer.step, tokens=trainer.tokens)
    log.info("checkpoint: %s", folder)
    return folder


def restore_trainer(trainer: "Trainer") -> Path | None:
    """Continue from the run's newest valid checkpoint, else start from `trainer.load_path`.

    Raises:
        CheckpointError: `load_strategy` is always and there is nothing to load, or it does not fit.
    """
    config = trainer.config
    own = _agreed(trainer, lambda: find_latest(trainer.run.path(RUN_FILES.checkpoints)))
    if own is not None:
        _load(trainer, own, weights_only=False)
        return own
    if config.load_strategy == "never" or config.load_path is None:
        return None
    load_path = Path(config.load_path)
    found = _agreed(trainer, lambda: locate(load_path))
    if found is None:
        if config.load_strategy == "always":
            raise CheckpointError(f"trainer.load_path {load_path}: holds no valid checkpoint")
        return None
    _load(trainer, found, weights_only=config.load_weights_only)
    return found


def _agreed(trainer: "Trainer", look: Any) -> Path | None:
    """Rank 0 looks (and hashes), everybody gets its answer."""
    found: Path | CheckpointError | None = None
    if trainer.environment.is_main:
        try:
            found = look()
        except CheckpointError as error:
            found = error
    found = trainer.environment.broadcast(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


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
    export_hf(
        config,
        iterate_tensors(unfinished / TENSORS_FOLDER, "model."),
        unfinished / HF_FOLDER,
        tokenizer_folder=trainer.train_loader.tokenizer_folder,
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
