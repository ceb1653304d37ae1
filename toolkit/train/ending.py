"""How training ends when something fails: the first cause is what is reported. Files that cannot be
written any more, and helpers that died with the request to stop, are its consequences."""

import contextlib
import functools
import logging
from collections.abc import Mapping

from toolkit import parents, signals
from toolkit.checkpoint.folder import saved_steps
from toolkit.errors import RunError
from toolkit.launch.failures import Peers
from toolkit.launch.watchdog import Watchdog
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import FAILURE, RunState
from toolkit.train.callbacks.base import Callback
from toolkit.train.state import TrainState

log = logging.getLogger(__name__)

_BEFORE_THE_STEP = ("waiting for data", "forward and backward")


def start_watchdog(state: TrainState, peers: Peers) -> Watchdog | None:
    """The watchdog of this training, at work; None where the config wants none."""
    timeout = state.config.watchdog_timeout
    if timeout is None:
        return None
    watchdog = Watchdog(
        state.heartbeat,
        peers,
        timeout=timeout,
        has_lost_launcher=parents.launcher_is_gone,
        on_hang=lambda message: state.run.set_status(
            "failed", step=state.step, message=message, exit_reason="watchdog"
        ),
    )
    watchdog.start()
    return watchdog


def is_part_of_stop(state: TrainState, error: Exception, done: tuple[int, int]) -> bool:
    """Whether `error` may be no failure but the stop that was asked for: a signal for the whole
    process group ends compilers, and what a data set started, as well.

    The step that it broke off is then undone; `done` are the steps and tokens before it. Not where
    other ranks wait for this one in that step, nor in the middle of the optimizer's work.
    """
    stop, phase = state.stop_request, state.heartbeat.phase
    if state.environment.world_size > 1 or stop.reason in (None, FAILURE):
        return False
    if phase == "optimizer step":
        return False
    if phase in _BEFORE_THE_STEP:
        state.step, state.tokens = done
    log.warning(
        "%s: step %d is left out, since something it needed has ended too (%s: %s)",
        stop.reason, done[0] + 1, type(error).__name__, error,
    )  # fmt: skip
    return state.should_stop()


def listening(state: TrainState) -> contextlib.AbstractContextManager[None]:
    """Requests go to this training inside the block; the one that ends it at once is noted."""
    state.stop_request.speak_last = functools.partial(_break_off, state)
    return signals.listening(state.stop_request)


def _break_off(state: TrainState, reason: str) -> str:
    """Say in the status where a second request ended the run; the line for the user."""
    step, tokens = state.step, state.tokens
    if state.heartbeat.phase == "forward and backward":
        step, tokens = step - 1, tokens - state.tokens_per_step
    saved = saved_steps(state.run.path(RUN_FILES.checkpoints))
    newest = f"the newest checkpoint is step{saved[-1]}" if saved else "nothing is saved yet"
    line = f"{reason} again: stopped now at step {step}; {newest}"
    outcome: RunState = "stopped" if saved else "failed"
    place = {"step": step, "tokens": tokens, "loss": state.last_loss}
    state.run.break_off(outcome, message=line, exit_reason=reason, **place)
    return line


def close_after_failure(state: TrainState, message: str) -> None:
    """Leave the run as failed; nothing raised here takes the place of the failure."""
    try:
        if state.recorder is not None:
            state.recorder.close(flush=False)
    finally:
        place = {"step": state.step, "tokens": state.tokens, "loss": state.last_loss}
        with contextlib.suppress(RunError):
            state.run.close("failed", message=message, exit_reason="error", **place)


def close_callbacks(state: TrainState, callbacks: Mapping[str, Callback]) -> None:
    """Close what the callbacks and the metrics hold open."""
    for name, callback in callbacks.items():
        try:
            callback.close()
        except Exception as error:
            log.warning("callback %s: close: %s: %s", name, type(error).__name__, error)
    if state.streams is not None:
        try:
            state.streams.close()
        except OSError as error:
            if state.run.find_removal() is None:  # which has been told
                log.warning("the last metrics are not on disk: %s", error)
