"""The loop.

    for each batch:  forward and backward  ->  optimizer  ->  record  ->  callbacks

The trainer times the loop and calls what was given to it: a `TrainModule` that trains, loaders that
yield batches, callbacks that do the rest. It knows no model, no engine and no file format.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch

from toolkit.data.evaluation import EvalLoader
from toolkit.data.loader import TrainLoader
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.errors import ConfigError, ToolkitError, TrainingError
from toolkit.launch.failures import LostPeerError, Peers, first_line
from toolkit.metrics.recorder import MetricsRecorder
from toolkit.metrics.streams import MetricStreams
from toolkit.runs.manager import RunManager
from toolkit.runs.status import FAILURE, FINISH
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import TrainerConfig, TransformerTrainModuleConfig
from toolkit.train.ending import (
    close_after_failure,
    close_callbacks,
    is_part_of_stop,
    listening,
    start_watchdog,
)
from toolkit.train.hooks import Hook, add_metrics, by_name, find_hooks
from toolkit.train.module import TrainModule
from toolkit.train.restoring import restore_training
from toolkit.train.state import TrainState
from toolkit.train.telling import HARD_STOP, TrainResult, log_end, script_log

log = logging.getLogger(__name__)

STATUS_SECONDS = 15.0
LEAST_SECONDS = 0.05
"""Between two deliveries of metrics on one rank: twenty a second are all that anybody sees."""
_LAST = (
    "early_stopping", "checkpointer", "model_merger", "hf_converter", "sample_writer",
    "console_logger", "metric_saver",
)  # fmt: skip
"""Callbacks that all others come before."""


class Trainer:
    """Trains `model` on `train_loader`.

    Args:
        config: the loop.
        model: a `TrainModule`, or a bare model, which `train_module_config` (default settings when
            not given) wraps.
        train_loader, eval_loaders: from `get_dataloaders`; one loader alone is called "val".
        run: from `start_run`; where everything is written.
        train_module_config, environment: for a bare model; `environment` is from
            `prepare_training_environment`.
        callbacks: more callbacks by name, see `add_callback`; those of a list are called by their
            classes, `StopWhenGood` is "stop_when_good".
    """

    def __init__(
        self,
        config: TrainerConfig,
        model: TrainModule | torch.nn.Module,
        train_loader: TrainLoader,
        eval_loaders: Mapping[str, EvalLoader] | EvalLoader | None = None,
        *,
        run: RunManager,
        train_module_config: TransformerTrainModuleConfig | None = None,
        environment: TrainingEnvironment | None = None,
        callbacks: Mapping[str, Callback] | Sequence[Callback] | None = None,
    ) -> None:
        if not isinstance(model, TrainModule):
            wrap = train_module_config or TransformerTrainModuleConfig()
            model = cast(TrainModule, wrap.build(model, environment=environment))
        if isinstance(eval_loaders, EvalLoader):
            eval_loaders = {"val": eval_loaders}
        self.callbacks: dict[str, Callback] = {}
        self._hooks: dict[str, list[tuple[str, Hook]]] = {}
        self.state = TrainState(
            config, model, train_loader, eval_loaders or {}, run, self.callbacks
        )
        self._restored: bool | None = None
        for given in (config.callbacks.build(), by_name(callbacks)):
            for name, callback in given.items():
                self.add_callback(name, callback)
        self._first_step = 0
        self._status_at = 0.0

    def add_callback(self, name: str, callback: Callback) -> None:
        """Call `callback` too, after those there are, but before the checkpoint of a step is
        written, which keeps its state as `name`.

        Raises:
            ConfigError: the name is taken, or it is no `Callback`.
        """
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callback {name}: derive its class from toolkit.Callback, and give an object of "
                f"it, not {callback!r:.80}"
            )
        if self._hooks:
            raise ConfigError(f"callback {name}: training has begun; add it before `fit`")
        if self._restored and type(callback).state_tensors is not Callback.state_tensors:
            problem = "has tensors in the checkpoint, which is loaded; add it before `restore`"
            raise ConfigError(f"callback {name}: {problem}")
        if name in self.callbacks:
            raise ConfigError(f"callback {name}: there is one of this name; choose another name")
        callback.state = self.state
        later = [] if name in _LAST else [n for n in _LAST if n in self.callbacks]
        last = {n: self.callbacks.pop(n) for n in later}
        self.callbacks.update({name: callback, **last})
        self.state.load_callback(name)

    def restore(self) -> None:
        """Continue from the run's newest checkpoint, or from `load_path`; once.

        Raises:
            CheckpointError, DataError: it does not fit this model, optimizer or data.
        """
        if self._restored is None:
            self._restored = restore_training(self.state) is not None

    def fit(self) -> TrainResult:
        """Train to the end, or until asked to stop; a run with a checkpoint continues from it.

        Raises:
            TrainingError: training cannot go on, here or on another rank.
        """
        with script_log(self.state):
            result = self._fit()
            log_end(self.state, result)
        return result

    def _fit(self) -> TrainResult:
        state, watchdog = self.state, None
        environment, stop = state.environment, state.stop_request
        peers = Peers(
            state.run,
            rank=environment.rank,
            world_size=environment.world_size,
            role_of=environment.layout.role,
        )
        try:
            self.restore()
            self._hooks = find_hooks(self.callbacks, state)
            self._open_metrics(resumed=bool(self._restored))
            watchdog = start_watchdog(state, peers)
            with listening(state):
                state.heartbeat.beat("preparing", state.step, is_slow=True)
                state.train_module.before_training(state)
                self._call("pre_train")
                reason = self._loop()
                if not stop.is_agreed:
                    self._call("post_train")  # polls too: evaluating takes time
                if stop.is_agreed:
                    reason = stop.reason
                    self._call("on_stop")
            state.heartbeat.beat("ending", state.step, is_slow=True)
            state.recorder.close()
            stop.done()
        except BaseException as error:
            cause = state.run.find_removal() or peers.report(error, step=state.step)
            close_after_failure(state, first_line(cause or error))
            if cause is not None:
                raise cause from error
            raise
        finally:
            close_callbacks(state, self.callbacks)
            if watchdog is not None:
                watchdog.stop()
        outcome: Literal["finished", "stopped", "failed"] = "stopped"
        note = None
        if reason is None:
            outcome = "finished"
        elif state.saved_step is None and reason != HARD_STOP:
            outcome, note = "failed", f"stopped ({reason}) without a checkpoint"
        state.run.close(
            outcome,
            message=note,
            step=state.step,
            tokens=state.tokens,
            loss=state.last_loss,
            exit_reason=reason or state.finish_reason or "done",
        )
        reason = reason or state.finish_reason
        return TrainResult(outcome, state.step, reason, state.saved_step, state.last_eval)

    def _loop(self) -> str | None:
        """Steps until the end (None), the hard stop, or a stop that ranks agreed on."""
        state, interval = self.state, self.state.config.cancel_check_interval
        self._first_step = state.step + 1
        batches = state.train_loader.iterate(state.step)
        try:
            while state.step < state.stop_step:
                state.step_started = time.perf_counter()
                if state.step % interval == 0:
                    if state.should_stop():
                        break
                    if state.stop_request.is_complete:
                        asked = state.environment.broadcast(state.asked_to_finish)
                        state.finish(asked or FINISH, is_agreed=True)
                        break
                state.heartbeat.beat("waiting for data", state.step + 1)
                done = state.step, state.tokens
                waiting = time.perf_counter()
                try:
                    batch = next(batches)
                    state.data_seconds = time.perf_counter() - waiting
                    self._train_step(batch)
                except Exception as error:
                    if not is_part_of_stop(state, error, done):
                        raise
                    break
        finally:
            batches.close()
            state.wait_for_copies()
        self._raise_failure()
        if state.stop_request.is_agreed:
            return state.stop_request.reason
        is_early = state.stop_step < state.total_steps and state.finish_reason is None
        return HARD_STOP if is_early else None

    def _train_step(self, batch: dict[str, torch.Tensor]) -> None:
        state, module = self.state, self.state.train_module
        before = state.begin_step()
        is_first = state.step == self._first_step  # it compiles
        state.heartbeat.beat("forward and backward", state.step, is_slow=is_first)
        for _, hook in self._hooks["pre_step"]:
            hook()
        module.progress = before
        metrics = module.train_batch(batch)
        state.heartbeat.beat("optimizer step", state.step, is_slow=is_first)
        for _, hook in self._hooks["pre_optim_step"]:
            hook()
        metrics |= module.optim_step(before)
        for name, hook in self._hooks["post_step"]:
            if (found := hook()) is not None:
                add_metrics(metrics, found, name, state.step)
        values: dict[str, Any] = {
            "tokens": state.tokens,
            "epoch": state.train_loader.batches.epochs_done(state.step),
            "time": time.time(),
            "attempt": state.run.attempt,
        }
        values |= state.train_loader.batches.sizes(before.step)
        for source, count in state.train_loader.counts(state.step).items():
            values[f"instances/{source}"] = count
        reductions: dict[str, Any] = {}
        for name, (value, reduction) in metrics.items():
            values[name], reductions[name] = value, reduction
        state.recorder.record(state.step, values, reductions)
        for label, hook in self._hooks["post_record"]:
            state.heartbeat.beat(label, state.step, is_slow=True)
            hook()

    def _raise_failure(self) -> None:
        """What ended training, if something did: after a flush all ranks know it, and the same."""
        state, stop = self.state, self.state.stop_request
        if stop.is_agreed and stop.reason != FAILURE:
            return  # saving flushes
        try:
            state.recorder.flush()
            if stop.is_agreed or any(state.environment.gather(state.failure is not None)):
                self._call("on_failure")
        except ToolkitError:
            if state.failure is None:  # else a consequence
                raise
        if state.failure is not None:
            raise state.failure
        if stop.is_agreed:
            raise LostPeerError("another rank has failed; its message and its log say why")

    def _call(self, event: str) -> None:
        for label, hook in self._hooks[event]:
            self.state.heartbeat.beat(f"{label}.{event}", self.state.step, is_slow=True)
            hook()

    def _open_metrics(self, *, resumed: bool) -> None:
        state = self.state
        step = state.step if resumed else None
        tensorboard = state.config.callbacks.tensorboard
        state.streams = MetricStreams(
            state.run.folder,
            tensorboard=tensorboard.streams if tensorboard.enabled else (),
            resume_step=step,
            is_main=state.is_main,
        )
        is_several = state.environment.world_size > 1
        state.recorder = MetricsRecorder(
            collect_interval=state.config.metrics_collect_interval,
            deliver=self._deliver,
            reduce=state.environment.reduce_columns if is_several else None,
            sync=state.streams.sync,
            start_step=state.step if resumed else -1,
            least_seconds=0.0 if is_several else LEAST_SECONDS,
        )

    def _deliver(self, stream: str, records: list[dict[str, Any]]) -> None:
        """Reduced records, in the metrics thread: derive, write, tell the callbacks."""
        state = self.state
        state.run.check_owner_after_pause()
        if (removed := state.run.find_removal()) is not None:
            state.fail(removed)
            return
        if stream == "train":
            for record in records:
                if state.train_module.has_perplexity:
                    record["ppl"] = math.exp(min(record["loss"], 700.0))
                record["skipped"] = int(record["skipped"])
                self._watch_skipped(record)
            state.last_loss = records[-1]["loss"]
            self._update_status(records[-1])
        state.streams.write(stream, records)
        for _, hook in self._hooks["on_metrics"]:
            hook(stream, records)

    def _watch_skipped(self, record: dict[str, Any]) -> None:
        state, step = self.state, record["step"]
        if not record["skipped"]:
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        record["instances"] = state.train_loader.instance_indices(step - 1).tolist()
        is_finite = math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
        log.warning(
            "step %d skipped: loss %s, grad_norm %s is %s; its batch is instances %s of the "
            "training data",
            step, record["loss"], record["grad_norm"],
            "a spike among the last steps" if is_finite else "not finite", record["instances"],
        )  # fmt: skip
        limit = state.train_module.max_consecutive_skipped_steps
        if state.skipped_in_a_row >= limit:
            state.fail(
                TrainingError(
                    f"step {step}: {limit} steps in a row had "
                    f"{'a spike of' if is_finite else 'a non-finite'} loss or gradient; lower "
                    "train_module.optim.lr, look at the data, or raise "
                    "train_module.max_consecutive_skipped_steps"
                )
            )

    def _update_status(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.state.is_main and now - self._status_at > STATUS_SECONDS:
            self._status_at = now
            self.state.run.set_status(
                "running", step=record["step"], tokens=record["tokens"], loss=record["loss"]
            )
