"""Saving a trainer: at once, or in a background thread while training goes on.

An asynchronous save stops training only to copy this rank's part of the state into host memory. A
thread of each rank then writes, and the ranks commit together over a process group of their own. At
most one save is in flight; the next waits for it.
"""

import importlib.metadata
import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from toolkit.checkpoint.commit import Save, write_checkpoint
from toolkit.checkpoint.folder import Kind
from toolkit.checkpoint.save_plan import Resolve, ShardWriter
from toolkit.errors import RunError, ToolkitError, TrainingError
from toolkit.launch.failures import LostPeerError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import new_output
from toolkit.threads import Thread

if TYPE_CHECKING:
    from toolkit.train.module import TrainModule
    from toolkit.train.trainer import Trainer

log = logging.getLogger(__name__)

_VERSIONED = ("torch", "accelerate", "deepspeed", "numpy")

_NOT_SCORES = ("step", "tokens", "time", "seconds", "num_targets")


class TrainerSaver:
    """Commits checkpoints of `trainer`; all ranks call its methods at the same steps.

    Args:
        after_commit: called with each committed folder, on all ranks, in the thread that wrote it.
    """

    def __init__(self, trainer: "Trainer", after_commit: Callable[[Path], None]) -> None:
        self._trainer = trainer
        self._after_commit = after_commit
        self._shards: ShardWriter | None = None
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, *, kind: Kind = "permanent", export_hf: bool = False) -> None:
        """Commit a checkpoint of the current step; return when it is there.

        Metrics of all steps so far are on disk before the checkpoint exists.

        Raises:
            RunError: another process has taken the run over; nothing is written.
            TrainingError: it could not be written; the checkpoints before it are as they were.
        """
        self.wait()
        save, shards, tensors = self._begin(kind, export_hf=export_hf)
        self._write(save, shards.live(tensors))

    def begin_save(self, *, kind: Kind = "permanent") -> None:
        """Start committing a checkpoint of the current step; return when the state is copied.

        What goes wrong later is in `take_error`.

        Raises:
            RunError: another process has taken the run over; nothing is written.
        """
        self.wait()
        save, shards, tensors = self._begin(kind, export_hf=False)
        resolve = shards.copy(tensors)

        def work() -> None:
            try:
                self._write(save, resolve)
            except Exception as error:
                self._error = error

        self._thread = Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the save in flight, if there is one."""
        if self._thread is not None:
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._thread = None

    def take_error(self) -> ToolkitError | None:
        """What went wrong in a background save that has ended; once."""
        error, self._error = self._error, None
        if error is None or isinstance(error, ToolkitError):
            return error
        wrapped = TrainingError(f"checkpoint not saved: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        return wrapped

    def _begin(
        self, kind: Kind, *, export_hf: bool
    ) -> tuple[Save, ShardWriter, dict[str, torch.Tensor]]:
        trainer = self._trainer
        _check_owner(trainer)
        _keep_tokenizer(trainer)
        environment, module = trainer.environment, trainer.train_module
        flush = trainer.recorder.begin_flush(lambda: trainer.skipped_in_a_row)
        state = {"trainer": trainer.state_dict(), "rng": _rng_state()}

        def rank_state() -> dict[str, Any]:
            state["trainer"]["skipped_in_a_row"] = flush.wait()
            return state

        if self._shards is None:
            self._shards = ShardWriter(environment.checkpoint_group)
        save = Save(
            root=trainer.run.path(RUN_FILES.checkpoints),
            step=trainer.step,
            tokens=trainer.tokens,
            engine=environment.layout.name,
            kind=kind,
            scores=_scores(trainer.last_eval, trainer.step),
            rank_state=rank_state,
            extra={
                "model": msgspec.to_builtins(module.model_config),
                "optim": msgspec.to_builtins(module.optim_config),
                "data": trainer.train_loader.state_dict(),
                "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
                **({"source": module.origin} if module.origin is not None else {}),
                **_adapter(module),
            },
            export=(lambda unfinished: _export_hf(trainer, unfinished)) if export_hf else None,
        )
        return save, self._shards, module.state_tensors()

    def _write(self, save: Save, resolve: Resolve) -> None:
        trainer = self._trainer
        environment = trainer.environment
        assert self._shards is not None, "begun"
        started = time.monotonic()
        folder = write_checkpoint(
            save,
            self._shards,
            resolve,
            rank=environment.rank,
            group=environment.checkpoint_group,
        )
        trainer.saved_step = save.step
        trainer.stop_request.allow_for(time.monotonic() - started)
        trainer.run.set_status("running", step=save.step, tokens=save.tokens)
        log.info("checkpoint: %s", folder)
        self._after_commit(folder)


def _check_owner(trainer: "Trainer") -> None:
    """A process that was suspended and lost the run must not touch what its new owner writes."""
    refusal: RunError | None = None
    try:
        trainer.run.check_owner()
        refusal = trainer.run.find_removal()
    except RunError as error:
        refusal = error
    everywhere = trainer.environment.broadcast(refusal)
    if everywhere is not None:  # rank 0 says it
        raise refusal if refusal is not None else LostPeerError(str(everywhere))


def _keep_tokenizer(trainer: "Trainer") -> None:
    """Copy the tokenizer into the run folder, once: data may be gone when the model is used."""
    source, kept = trainer.train_loader.tokenizer_folder, trainer.run.path(RUN_FILES.tokenizer)
    if not trainer.environment.is_main or source is None or not source.is_dir() or kept.is_dir():
        return
    try:
        with new_output(kept) as unfinished:
            resolve_name("toolkit.hf.tokenizer_files:copy_tokenizer")(source, unfinished)
    except (OSError, ToolkitError) as error:
        log.warning("the tokenizer is not in the run folder: %s", error)


def _scores(evaluation: dict[str, Any] | None, step: int) -> dict[str, float]:
    """Results of an evaluation at `step` that are numbers, as "val/loss"."""
    if evaluation is None or evaluation["step"] != step:
        return {}
    name = evaluation["name"]
    return {
        f"{name}/{key}": float(value)
        for key, value in evaluation.items()
        if isinstance(value, int | float) and math.isfinite(value) and key not in _NOT_SCORES
    }


def _adapter(module: "TrainModule") -> dict[str, Any]:
    """What says that a checkpoint holds an adapter, and on which model."""
    if module.adapter_config is None:
        return {}
    return {
        "adapter": msgspec.to_builtins(module.adapter_config),
        "base": msgspec.to_builtins(module.base),
    }


def _export_hf(trainer: "Trainer", unfinished: Path) -> None:
    """`hf/` of a checkpoint, from the tensors just written."""
    module, folder = trainer.train_module, trainer.train_loader.tokenizer_folder
    resolve_name("toolkit.hf.export:export_checkpoint")(
        unfinished,
        module.model_config,
        lora=module.adapter_config,
        base=None if module.base is None else msgspec.to_builtins(module.base),
        origin=module.origin,
        tokenizer_folder=folder if folder is not None and folder.is_dir() else None,
    )


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": list(random.getstate()[1]), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # not by a run on the CPU, whatever the machine has
        state["cuda"] = torch.cuda.get_rng_state()
    return state
