"""Saving training: at once, or in a background thread while it goes on.

An asynchronous save stops training only to copy this rank's part of the state into host memory. A
thread of each rank then writes, and the ranks commit together over a process group of their own. At
most one save is in flight; the next waits for it.
"""

import importlib.metadata
import logging
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from toolkit.checkpoint.commit import Save, write_checkpoint
from toolkit.checkpoint.folder import Kind
from toolkit.checkpoint.save_plan import Resolve, ShardWriter
from toolkit.config.named import named
from toolkit.errors import RunError, ToolkitError, TrainingError
from toolkit.launch.failures import LostPeerError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import new_output
from toolkit.threads import Thread
from toolkit.train.module import TrainModule
from toolkit.train.scores import scores_at
from toolkit.train.state import TrainState

log = logging.getLogger(__name__)

_VERSIONED = ("torch", "accelerate", "deepspeed", "numpy")


class TrainerSaver:
    """Commits checkpoints; all ranks call its methods at the same steps. `after_commit` is called
    with each committed folder, on all ranks, in the thread that wrote it."""

    def __init__(self, state: TrainState, after_commit: Callable[[Path], None]) -> None:
        self._state = state
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
        """`save`, but return when the state is copied; `take_error` tells what goes wrong later."""
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
        state = self._state
        _check_owner(state)
        _keep_tokenizer(state)
        environment, module = state.environment, state.train_module
        flush = state.recorder.begin_flush(lambda: state.skipped_in_a_row)
        rank_state = {"trainer": state.state_dict(), "rng": _rng_state()}

        def flushed_rank_state() -> dict[str, Any]:
            rank_state["trainer"]["skipped_in_a_row"] = flush.wait()
            return rank_state

        if self._shards is None:
            self._shards = ShardWriter(environment.checkpoint_group)
        extra = {
            "model": msgspec.to_builtins(module.model_config),
            "optim": msgspec.to_builtins(module.optim_config),
            "data": state.train_loader.state_dict(),
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
            **({"source": module.origin} if module.origin is not None else {}),
            **_adapter(module),
        }
        save = Save(
            root=state.run.path(RUN_FILES.checkpoints),
            step=state.step,
            tokens=state.tokens,
            engine=environment.layout.name,
            kind=kind,
            scores=scores_at(state.step, state.last_eval),
            rank_state=flushed_rank_state,
            extra=extra,
            export=partial(_export_hf, state, extra=extra) if export_hf else None,
        )
        return save, self._shards, module.state_tensors()

    def _write(self, save: Save, resolve: Resolve) -> None:
        state, environment = self._state, self._state.environment
        assert self._shards is not None, "begun"
        started = time.monotonic()
        folder = write_checkpoint(
            save,
            self._shards,
            resolve,
            rank=environment.rank,
            group=environment.checkpoint_group,
        )
        state.saved_step = save.step
        state.stop_request.allow_for(time.monotonic() - started)
        state.run.set_status("running", step=save.step, tokens=save.tokens)
        log.info("checkpoint: %s", folder)
        self._after_commit(folder)


def _check_owner(state: TrainState) -> None:
    """A process that was suspended and lost the run must not touch what its new owner writes."""
    refusal: RunError | None = None
    try:
        state.run.check_owner()
        refusal = state.run.find_removal()
    except RunError as error:
        refusal = error
    everywhere = state.environment.broadcast(refusal)
    if everywhere is not None:  # rank 0 says it
        raise refusal if refusal is not None else LostPeerError(str(everywhere))


def _keep_tokenizer(state: TrainState) -> None:
    """Copy the tokenizer into the run folder, once: data may be gone when the model is used."""
    source, kept = state.train_loader.tokenizer_folder, state.run.path(RUN_FILES.tokenizer)
    if not state.is_main or source is None or not source.is_dir() or kept.is_dir():
        return
    try:
        with new_output(kept) as unfinished:
            named("toolkit.hf.tokenizer_files:copy_tokenizer")(source, unfinished)
    except (OSError, ToolkitError) as error:
        log.warning("the tokenizer is not in the run folder: %s", error)


def _adapter(module: TrainModule) -> dict[str, Any]:
    """What says that a checkpoint holds an adapter, and on which model."""
    if module.adapter_config is None:
        return {}
    return {
        "adapter": msgspec.to_builtins(module.adapter_config),
        "base": msgspec.to_builtins(module.base),
    }


def _export_hf(state: TrainState, unfinished: Path, extra: dict[str, Any]) -> None:
    """`hf/` of a checkpoint, from the tensors just written."""
    folder = state.train_loader.tokenizer_folder
    tokenizer = folder if folder is not None and folder.is_dir() else None
    named("toolkit.hf.export:export_checkpoint")(unfinished, extra, tokenizer_folder=tokenizer)


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": list(random.getstate()[1]), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # not by a run on the CPU, whatever the machine has
        state["cuda"] = torch.cuda.get_rng_state()
    return state
