"""Where training starts: which checkpoint, and its state into place."""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolkit.checkpoint.find import (
    Found,
    find_checkpoint,
    find_remote_checkpoint,
    problem_of,
    set_aside,
)
from toolkit.checkpoint.folder import MODEL_PREFIX, read_metadata, saved_steps
from toolkit.checkpoint.load import load_checkpoint, load_weights, shapes_of
from toolkit.checkpoint.remote import download_newest
from toolkit.checkpoint.together import run_together
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.errors import CheckpointError
from toolkit.models.shapes import SCORE
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import is_url
from toolkit.train.adapter_base import check_adapter, check_new_score, describe_base, find_base
from toolkit.train.config import NO_BASE, TrainerConfig
from toolkit.train.matching import (
    change_of_training,
    renamed,
    without_new_head,
    without_new_moments,
)
from toolkit.train.progress import no_checkpoint, none_saved, reached_step, refusal, set_run_aside
from toolkit.train.run_config import log_python_config
from toolkit.train.state import TrainState

log = logging.getLogger(__name__)

FindRemote = Callable[[str], Path | str | None]


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
    find_remote: FindRemote = lambda url: find_remote_checkpoint(url).checkpoint,
    *,
    adapts: bool = False,
    reached: int = 0,
) -> Start | None:
    """The newest valid checkpoint in `own`, the run's folder of them; else of what the run has
    uploaded; else of `trainer.load_path`, on whose model a run that `adapts` trains an adapter.

    Raises:
        CheckpointError: the run tells of a step that it has `reached`, and no checkpoint of its own
            is whole; `load_path` holds none, or not the base of the run's adapter.
    """

    def look(path: str) -> Path | str | None:
        return find_remote(path) if is_url(path) else find(Path(path).expanduser()).checkpoint

    newest, rejected = find(own)
    found: Path | str | None = newest
    upload_to = config.callbacks.checkpointer.upload_to
    if found is None and upload_to is not None:
        found = find_remote(upload_to)
    if found is not None:
        base = find_base(found, config.load_path, look) if adapts else None
        return Start(found, weights_only=False, rejected=rejected, base=base)
    start = _find_given(config, look, adapts=adapts)
    if reached and not config.start_anew and reached > (step := first_step(start)):
        why = problem_of(rejected[0]) if rejected else none_saved(own.parent, config.no_checkpoints)
        where = f"step {step:,}" if start is None else f"trainer.load_path ({start.checkpoint})"
        raise refusal(own.parent, reached, str(why), where)
    return None if start is None else start._replace(rejected=rejected)


def _find_given(config: TrainerConfig, look: FindRemote, *, adapts: bool) -> Start | None:
    """What `trainer.load_path` and its neighbours ask for."""
    if config.load_strategy == "never" or config.load_path is None:
        if adapts:
            raise CheckpointError(NO_BASE)
        return None
    given = look(config.load_path)
    if given is not None:
        return Start(given, weights_only=adapts or config.load_weights_only)
    if config.load_strategy != "if_available" or adapts:
        raise CheckpointError(no_checkpoint(config.load_path))
    return None


def reached_by(config: TrainerConfig, folder: Path) -> int:
    """`reached_step`, or of a run folder without checkpoints the last step that was uploaded; one
    rank asks."""
    upload_to, reached = config.callbacks.checkpointer.upload_to, reached_step(folder)
    if upload_to is None or saved_steps(folder / RUN_FILES.checkpoints):
        return reached
    return max([reached, *saved_steps(upload_to)])


def first_step(start: Start | None) -> int:
    """The number of steps that are done where training starts."""
    return 0 if start is None or start.weights_only else read_metadata(start.checkpoint).step


def is_inside(checkpoint: Path | str, root: Path) -> bool:
    """Whether `checkpoint` is one of those in the folder `root`."""
    return isinstance(checkpoint, Path) and checkpoint.parent == root


def restore_training(state: TrainState) -> Path | str | None:
    """Load what `find_start` finds, and return it; every rank calls it.

    Raises:
        CheckpointError: see `find_start`, or it does not fit.
        TrainingError: a remote folder cannot be reached.
    """
    run, environment, config = state.run, state.environment, state.config
    own = run.path(RUN_FILES.checkpoints)
    place: Any = {"rank": environment.rank, "group": environment.cpu_group}

    def find_remote(url: str) -> Path | str | None:
        if url == config.callbacks.checkpointer.upload_to:
            return download_newest(url, own, **place)
        if config.load_in_place:
            return find_remote_checkpoint(url, **place).checkpoint
        return download_newest(url, run.path(RUN_FILES.downloads), **place)

    reached = run_together(
        lambda: reached_by(config, run.folder) if state.is_main else 0,
        environment.cpu_group,
        failing=f"{run.folder}: cannot be continued",
    )[0]
    start = find_start(
        config,
        own,
        lambda path: find_checkpoint(path, **place),
        find_remote,
        adapts=state.train_module.adapter_config is not None,
        reached=reached,
    )
    is_own = start is not None and is_inside(start.checkpoint, own)
    if start is not None:
        _load(state, start, mapping={} if is_own else config.load_key_mapping)
    if is_own:
        state.saved_step = state.step
    if state.is_main:
        if reached > state.step and not is_own:
            kept = set_run_aside(run.folder, run.attempt)
            run.set_status("running", step=state.step, tokens=state.tokens)
            log.warning("started anew; what there was is kept: %s", ", ".join(kept))
        elif start is not None:
            set_aside(start.rejected)
        log_python_config(state)
        if groups := state.train_module.optimizer_groups:
            run.metadata.log(groups, RUN_FILES.optimizer_groups)
    return None if start is None else start.checkpoint


def _load(state: TrainState, start: Start, *, mapping: Mapping[str, str]) -> None:
    environment, module = state.environment, state.train_module
    checkpoint, group = start.checkpoint, environment.cpu_group
    if base_weights := module.base_tensors():
        _load_base(state, start, base_weights)
    if not start.weights_only:
        stored = run_together(
            lambda: shapes_of(checkpoint) if environment.is_main else {},
            group,
            failing=f"{checkpoint}: cannot be loaded",
        )[0]
        tensors = without_new_moments(renamed(module.state_tensors(), mapping), stored)
        of_callbacks = {k: t for k, t in state.callback_tensors().items() if k in stored}
        metadata, saved = load_checkpoint(
            checkpoint, tensors=tensors | of_callbacks, rank=environment.rank, group=group
        )
        if environment.is_main and module.trained_names is not None and not mapping:
            for line in change_of_training(stored, module.trained_names):
                log.info("%s", line)
        with usable_state(checkpoint):
            state.load_state_dict(saved["trainer"])
            state.callbacks_filled(of_callbacks.keys())
            if metadata.world_size == environment.world_size:
                _set_rng_state(saved["rng"])
        module.origin = metadata.extra.get("source")
    elif not base_weights:
        tensors = renamed(_known(module.state_tensors(), checkpoint, environment), mapping)
        weights = {key: t for key, t in tensors.items() if key.startswith(MODEL_PREFIX)}
        load_weights(checkpoint, weights, group)
        module.origin = read_metadata(checkpoint).extra.get("source")
    module.state_filled()
    log.info("loaded %s (step %d)", checkpoint, state.step)


@contextlib.contextmanager
def usable_state(checkpoint: Path | str) -> Iterator[None]:
    """Raises CheckpointError where the block finds that a rank's state, which may be anything, is
    not what a trainer saves."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint}: holds no state of a trainer: {type(error).__name__}: {error}"
        ) from error


def _load_base(state: TrainState, start: Start, weights: dict[str, torch.Tensor]) -> None:
    """Fill what the run's own checkpoints do not hold."""
    base = start.checkpoint if start.weights_only else start.base
    assert base is not None, "adapters are loaded with their base"
    module = state.train_module
    check_adapter(base, read_metadata(base), module.adapter_config, weights_only=True)
    known = _known(weights, base, state.environment)
    if len(known) < len(weights):
        check_new_score(module.adapter_config)
    weights = known
    # Of all at once: a pattern that changes no name is an error, and may change those of one part.
    stored = renamed(dict(zip(weights, weights, strict=True)), state.config.load_key_mapping)
    new_name = {own: new for new, own in stored.items()}

    def read(part: dict[str, torch.Tensor]) -> None:
        # Under no name here, which would keep a part alive beside the next.
        known = {new_name[n]: t for n, t in part.items() if n in new_name}
        load_weights(base, known, state.environment.cpu_group)

    for part in module.base_parts():
        read(part)
    if start.weights_only:
        module.fill_from_base(read)
    module.base = describe_base(base)


def _known(
    tensors: dict[str, torch.Tensor], checkpoint: Path | str, environment: TrainingEnvironment
) -> dict[str, torch.Tensor]:
    """What is there to be loaded of a checkpoint for the sake of its weights."""
    if f"{MODEL_PREFIX}{SCORE}" not in tensors:
        return tensors
    known = without_new_head(tensors, shapes_of(checkpoint))
    if len(known) < len(tensors) and environment.is_main:
        log.info("%s: is not in %s, and begins with initial values", SCORE, checkpoint)
    return known


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), None))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
