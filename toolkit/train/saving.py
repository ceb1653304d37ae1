"""What a checkpoint of training holds, besides the tensors."""

import importlib.metadata
import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from toolkit.checkpoint.commit import Save
from toolkit.checkpoint.folder import Kind
from toolkit.config.named import named
from toolkit.errors import RunError, ToolkitError
from toolkit.launch.failures import LostPeerError
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import new_output
from toolkit.train.module import TrainModule
from toolkit.train.state import TrainState

log = logging.getLogger(__name__)

_VERSIONED = ("torch", "accelerate", "deepspeed", "numpy")


def begin_save(state: TrainState, *, kind: Kind, export_hf: bool) -> Save:
    """A checkpoint of the current step, to be written; all ranks call it at the same steps. Metrics
    of all steps so far are on disk before it is committed. Raises RunError where another process
    has taken the run over."""
    _check_owner(state)
    _keep_tokenizer(state)
    module = state.train_module
    flush = state.recorder.begin_flush(
        lambda: (state.skipped_in_a_row, state.callback_states(follow_metrics=True))
    )
    rank_state = {"trainer": state.state_dict(), "rng": _rng_state()}

    def flushed_rank_state() -> dict[str, Any]:
        rank_state["trainer"]["skipped_in_a_row"], states = flush.wait()
        rank_state["trainer"]["callbacks"] |= states
        return rank_state

    extra = {
        **describe_model(module),
        "optim": msgspec.to_builtins(module.optim_config),
        "data": state.train_loader.state_dict(),
    }
    exports = export_hf and module.is_language_model
    return Save(
        root=state.run.path(RUN_FILES.checkpoints),
        step=state.step,
        tokens=state.tokens,
        engine=state.environment.layout.description,
        kind=kind,
        scores=state.scores,
        rank_state=flushed_rank_state,
        extra=extra,
        export=partial(_export_hf, state, extra=extra) if exports else None,
    )


def describe_model(module: TrainModule) -> dict[str, Any]:
    """What a checkpoint says of the model that its weights are of (`CheckpointMetadata.extra`)."""
    extra = {
        "model": msgspec.to_builtins(module.model_config),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    if module.origin is not None:
        extra["source"] = module.origin
    if module.adapter_config is not None:
        extra["adapter"] = msgspec.to_builtins(module.adapter_config)
        extra["base"] = msgspec.to_builtins(module.base)
    return extra


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


def _export_hf(state: TrainState, unfinished: Path, extra: dict[str, Any]) -> None:
    """`hf/` of a checkpoint, from the tensors just written."""
    folder = state.train_loader.tokenizer_folder
    tokenizer = folder if folder is not None and folder.is_dir() else None
    named("toolkit.hf.export:export_checkpoint")(
        unfinished, extra, tokenizer_folder=tokenizer, weights=state.exported_weights
    )


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": list(random.getstate()[1]), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # not by a run on the CPU, whatever the machine has
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state
