"""How training ends when something fails: the first cause is what is reported. Files that cannot be
written any more, and helpers that died with the request to stop, are its consequences."""

import contextlib
import functools
import logging
from typing import TYPE_CHECKING

from toolkit.checkpoint.folder import saved_steps
from toolkit.errors import RunError
from toolkit.launch.failures import Peers
from toolkit.launch.watchdog import Watchdog
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import FAILURE

if TYPE_CHECKING:
    from toolkit.train.trainer import Trainer

log = logging.getLogger(__name__)

_BEFORE_THE_STEP = ("waiting for data", "forward and backward")


def start_watchdog(trainer: "Trainer", peers: Peers) -> Watchdog | None:
    """The watchdog of `trainer`, at work; None where the config wants none."""
    timeout, stop = trainer.config.watchdog_timeout, trainer.stop_request
    if timeout is None:
        return None
    watchdog = Watchdog(
        trainer.heartbeat,
        peers,
        timeout=timeout,
        has_lost_launcher=lambda: stop.has_lost_launcher,
        on_hang=lambda message: trainer.run.set_status(
            "failed", step=trainer.step, message=message, exit_reason="watchdog"
        ),
    )
    watchdog.start()
    return watchdog


def is_part_of_stop(trainer: "Trainer", error: Exception, done: tuple[int, int]) -> bool:
    """Whether `error` may be no failure but the stop that was asked for: a signal for the whole
    process group ends compilers, and what a data set started, as well.

    The step that it broke off is then undone; `done` are the steps and tokens before it. Not where
    other ranks wait for this one in that step, nor in the middle of the optimizer's work.
    """
    stop = trainer.stop_request
    if trainer.environment.world_size > 1 or stop.reason in (None, FAILURE):
        return False
    phase = trainer.heartbeat.phase
    if phase == "optimizer step":
        return False
    if phase in _BEFORE_THE_STEP:
        trainer.step, trainer.tokens = done
    log.warning(
        "%s: step %d is left out, since something it needed has ended too (%s: %s)",
        stop.reason, done[0] + 1, type(error).__name__, error,
    )  # fmt: skip
    return trainer.should_stop()


def listening(trainer: "Trainer") -> contextlib.AbstractContextManager[None]:
    """Requests go to the trainer inside the block; the one that ends it at once is noted."""
    stop = trainer.stop_request
    stop.speak_last = functools.partial(_break_off, trainer)
    return stop.listening()


def _break_off(trainer: "Trainer", reason: str) -> str:
    """Say in the status where a second request ended the run; the line for the user."""
    step, tokens = trainer.step, trainer.tokens
    if trainer.heartbeat.phase == "forward and backward":
        step, tokens = step - 1, tokens - trainer.tokens_per_step
    saved = saved_steps(trainer.run.path(RUN_FILES.checkpoints))
    newest = f"the newest checkpoint is step{saved[-1]}" if saved else "nothing is saved yet"
    line = f"{reason} again: stopped now at step {step}; {newest}"
    trainer.run.break_off(
        "stopped" if saved else "failed",
        step=step,
        tokens=tokens,
        message=line,
        exit_reason=reason,
    )
    return line


def close_after_failure(trainer: "Trainer", message: str) -> None:
    """Leave the run as failed; nothing raised here takes the place of the failure."""
    try:
        if trainer.recorder is not None:
            trainer.recorder.close(flush=False)
    finally:
        with contextlib.suppress(RunError):
            trainer.run.close(
                "failed",
                step=trainer.step,
                tokens=trainer.tokens,
                message=message,
                exit_reason="error",
            )


def close_callbacks(trainer: "Trainer") -> None:
    """Close what the callbacks and the metrics hold open."""
    for callback in trainer.callbacks.values():
        try:
            callback.close()
        except Exception as error:
            log.warning("%s: %s: %s", type(callback).__name__, type(error).__name__, error)
    if trainer.streams is not None:
        try:
            trainer.streams.close()
        except OSError as error:
            if trainer.run.find_removal() is None:  # which has been told
                log.warning("the last metrics are not on disk: %s", error)
