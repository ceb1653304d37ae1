"""What a run says of its beginning and its end, and the log file of a script that trains."""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.data.loader import TrainLoader
from toolkit.distributed.devices import device_name
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.logging import add_log_file, has_log_file, log_failure
from toolkit.runs.files import RUN_FILES
from toolkit.train.config import TrainerConfig
from toolkit.train.state import TrainState
from toolkit.wording import count

# These lines are the run's own, whichever of its files says them.
log = logging.getLogger("toolkit.experiment.run")

HARD_STOP = "hard_stop"
"""Reason of a stop that the config asked for."""


class TrainResult(NamedTuple):
    """How `Trainer.fit` ended."""

    state: str
    """"finished", "stopped", or "failed": stopped on request with nothing to resume from."""
    step: int
    reason: str | None
    """Why it stopped early."""
    saved_step: int | None
    """Where a resume would continue; None: nothing was saved."""
    last_eval: dict[str, Any] | None

    @property
    def is_gentle(self) -> bool:
        """Whether it ended as was asked for: exit code 0."""
        return self.state == "finished" or self.reason == HARD_STOP


def log_opening(
    config: TrainerConfig,
    environment: TrainingEnvironment,
    parameters: str,
    folder: Path,
    train_loader: TrainLoader,
) -> None:
    """What is trained, on what, and where; `parameters` is their number."""
    layout, device = environment.layout, device_name(environment.device)
    kind = environment.device.type
    lines = [
        *layout.notices,
        f"training {parameters} parameters on "
        f"{count(layout.world_size, 'process')}, {layout.description} in {layout.precision} on "
        f"{f'the CPU ({device})' if kind == 'cpu' else device}: {folder}",
        resume_promise(kind, deterministic=config.deterministic),
    ]
    per_epoch, dropped = train_loader.steps_per_epoch, train_loader.dropped_instances
    if not math.isinf(per_epoch):
        lines.append(
            f"{count(train_loader.num_instances, 'instance')} of up to "
            f"{count(train_loader.sequence_length, 'token')}: "
            f"{count(int(per_epoch), 'step')} an epoch"
            + (f", {count(dropped, 'instance')} left out" if dropped else "")
        )
    for line in lines:
        if line is not None:
            log.info("%s", line)


def resume_promise(device_type: str, *, deterministic: bool) -> str | None:
    """How equal a resumed run will be; None on CPUs, where it is bit-equal anyway."""
    if device_type == "cpu":
        return None
    if deterministic:
        return "a resumed run will be bit-equal on as many GPUs of the same kind"
    return (
        "a resumed run will be equal to rounding: GPU kernels add up in any order; "
        "--trainer.deterministic=true makes it bit-equal, and slower"
    )


@contextlib.contextmanager
def script_log(state: TrainState) -> Iterator[None]:
    """Inside, training that was put together in Python has the log file and the first lines that
    `toolkit train` gives its own, which has them already."""
    if has_log_file():
        yield
        return
    rank = state.environment.rank
    file = add_log_file(state.run.path(RUN_FILES.logs), rank)
    try:
        parameters = f"{state.train_module.num_parameters:,}"
        place = state.run.folder, state.train_loader
        log_opening(state.config, state.environment, parameters, *place)
        yield
    except BaseException as error:
        log_failure(file, error, rank=rank, step=state.step)
        raise
    finally:
        logging.getLogger("toolkit").removeHandler(file)
        file.close()


def log_end(state: TrainState, result: TrainResult) -> None:
    """The last evaluation, where everything is, and how to go on where that can be."""
    run = state.run
    if result.last_eval is not None and (result.last_eval["step"] or not result.step):
        evaluation = result.last_eval
        line = f"validation loss {evaluation['loss']:.4f}"
        if "bits_per_byte" in evaluation:
            line += f", {evaluation['bits_per_byte']:.4f} bits per byte"
        log.info("%s (step %d)", line, evaluation["step"])
    if result.is_gentle:
        early = f" ({result.reason})" if result.state == "finished" and result.reason else ""
        log.info("done at step %d%s; everything is in %s", result.step, early, run.folder)
        if result.reason == HARD_STOP and result.saved_step is not None:
            log.info("go on with: toolkit resume %s --trainer.hard_stop=null", run.folder)
        log.info("  %-12s %s", "metrics", run.path(RUN_FILES.metrics))
        if state.config.callbacks.tensorboard.enabled:
            log.info("  %-12s %s", "TensorBoard", run.path(RUN_FILES.tensorboard))
        log.info("  %-12s %s", "checkpoints", run.path(RUN_FILES.checkpoints))
    elif result.saved_step is None:
        log.warning(
            "stopped at step %d (%s); no checkpoint was saved (trainer.no_checkpoints or "
            "trainer.callbacks.checkpointer.enabled), so nothing can be continued",
            result.step, result.reason,
        )  # fmt: skip
    else:
        lost = f", from step {result.saved_step}" if result.saved_step < result.step else ""
        log.info(
            "stopped at step %d (%s); continue with: toolkit resume %s%s",
            result.step, result.reason, run.folder, lost,
        )  # fmt: skip
