"""The loop.

    for each batch:  forward and backward  ->  optimizer  ->  record  ->  callbacks

The trainer counts steps and tokens, times the loop and calls what was given to it: a `TrainModule`
that trains, loaders that yield batches, callbacks that do the rest. It knows no model, no engine
and no file format.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from toolkit.data.evaluation import EvalLoader
from toolkit.data.loader import TrainLoader
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.errors import ConfigError, ToolkitError, TrainingError
from toolkit.launch.failures import LostPeerError, Peers, first_line
from toolkit.launch.stopping import stop_request_of
from toolkit.launch.watchdog import Heartbeat
from toolkit.metrics.recorder import MetricsRecorder
from toolkit.metrics.streams import MetricStreams
from toolkit.runs.manager import RunManager
from toolkit.runs.status import FAILURE
from toolkit.train.callbacks import Callback, build_callbacks
from toolkit.train.config import Duration, TrainerConfig, TransformerTrainModuleConfig
from toolkit.train.ending import (
    close_after_failure,
    close_callbacks,
    is_part_of_stop,
    listening,
    start_watchdog,
)
from toolkit.train.module import Progress, TrainModule
from toolkit.train.restoring import restore_trainer

log = logging.getLogger(__name__)

STATUS_SECONDS = 15.0
HARD_STOP = "hard_stop"
"""Reason of a stop that the config asked for."""


class TrainResult(NamedTuple):
    """How `Trainer.train` ended."""

    state: str
    """"finished", "stopped", or "failed": stopped on request with nothing to resume from."""
    step: int
    reason: str | None
    """Why it stopped early."""
    saved_step: int | None
    """Where a resume would continue; None: nothing was saved."""
    last_eval: dict[str, Any] | None


class Trainer:
    """Trains `model` on `train_loader`.

    Args:
        config: the loop.
        model: a `TrainModule`, or a bare model, which `train_module_config` (default settings when
            not given) wraps.
        train_loader, eval_loaders: from `get_dataloaders`; one loader alone is called "val".
        run: from `start_run`; where everything is written.
        environment: from `prepare_training_environment`; only for a bare model.
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
    ) -> None:
        if not isinstance(model, TrainModule):
            wrap = train_module_config or TransformerTrainModuleConfig()
            model = wrap.build(model, environment=environment)
        self.config = config
        self.train_module = model
        self.environment = model.environment
        self.train_loader = train_loader
        if isinstance(eval_loaders, EvalLoader):
            eval_loaders = {"val": eval_loaders}
        self.eval_loaders: dict[str, EvalLoader] = dict(eval_loaders or {})
        self.run = run
        self.step = 0
        self.tokens = 0
        self.tokens_per_step = train_loader.global_batch_size
        self.saved_step: int | None = None
        self.data_seconds = 0.0
        self.last_eval: dict[str, Any] | None = None
        self._plan_steps()
        self.stop_request = stop_request_of(
            run.folder,
            is_main=self.environment.is_main,
            max_wall_time=config.max_wall_time,
            margin=config.wall_time_margin,
            stop_file=config.stop_file,
        )
        self.heartbeat = Heartbeat()
        self._first_step = 0
        self.callbacks = build_callbacks(config.callbacks)
        for callback in self.callbacks.values():
            callback.trainer = self
        self.recorder: MetricsRecorder = None  # type: ignore[assignment]
        self.streams: MetricStreams = None  # type: ignore[assignment]
        self._pre_step = self._hooks("pre_step")
        self._pre_optim_step = self._hooks("pre_optim_step")
        self._post_step = self._hooks("post_step")
        self._post_record = self._labelled_hooks("post_record")
        self._on_metrics = self._hooks("on_metrics")
        self._deferred: list[Callable[[], None]] = []
        self._restored: bool | None = None
        self._last_loss: float | None = None
        self.skipped_in_a_row = 0
        self._failure: ToolkitError | None = None
        self._status_at = 0.0

    def restore(self) -> None:
        """Continue from the run's newest checkpoint, or from `load_path`; once.

        Raises:
            CheckpointError, DataError: it does not fit this model, optimizer or data.
        """
        if self._restored is None:
            self._restored = restore_trainer(self) is not None

    def train(self) -> TrainResult:
        """Train to the end, or until asked to stop; a run with a checkpoint continues from it.

        Raises:
            TrainingError: training cannot go on, here or on another rank.
        """
        watchdog = None
        peers = Peers(self.run, rank=self.environment.rank, world_size=self.environment.world_size)
        try:
            self.restore()
            self._open_metrics(resumed=bool(self._restored))
            watchdog = start_watchdog(self, peers)
            with listening(self):
                self._call("pre_train")
                reason = self._loop()
                if not self.stop_request.is_agreed:
                    self._call("post_train")  # polls too: evaluating takes time
                if self.stop_request.is_agreed:
                    reason = self.stop_request.reason
                    self._call("on_stop")
            self.heartbeat.beat("ending", self.step, is_slow=True)
            self.recorder.close()
            self.stop_request.done()
        except BaseException as error:
            peers.fail(error, step=self.step)
            lost = self.run.find_removal() or peers.explain(error, step=self.step)
            close_after_failure(self, first_line(lost or error))
            if lost is not None:
                raise lost from error
            raise
        finally:
            close_callbacks(self)
            if watchdog is not None:
                watchdog.stop()
        state: Literal["finished", "stopped", "failed"] = "stopped"
        note = None
        if reason is None:
            state = "finished"
        elif self.saved_step is None and reason != HARD_STOP:
            state, note = "failed", f"stopped ({reason}) without a checkpoint"
        self.run.close(
            state,
            message=note,
            step=self.step,
            tokens=self.tokens,
            loss=self._last_loss,
            exit_reason=reason or "done",
        )
        return TrainResult(state, self.step, reason, self.saved_step, self.last_eval)

    def _loop(self) -> str | None:
        """Steps until the end (None), the hard stop, or a stop that ranks agreed on."""
        interval = self.config.cancel_check_interval
        self._first_step = self.step + 1
        batches = self.train_loader.iterate(self.step)
        try:
            while self.step < self.stop_step:
                if self.step % interval == 0 and self.should_stop():
                    break
                self.heartbeat.beat("waiting for data", self.step + 1)
                done = self.step, self.tokens
                waiting = time.perf_counter()
                try:
                    batch = next(batches)
                    self.data_seconds = time.perf_counter() - waiting
                    self._train_step(batch)
                except Exception as error:
                    if not is_part_of_stop(self, error, done):
                        raise
                    break
        finally:
            batches.close()
        self._raise_failure()
        if self.stop_request.is_agreed:
            return self.stop_request.reason
        return HARD_STOP if self.stop_step < self.total_steps else None

    def should_stop(self) -> bool:
        """Whether all ranks stop now; work between steps asks too. All ranks call it equally
        often."""
        self.heartbeat.count += 1
        return self.stop_request.poll(self.environment.cpu_group)

    def _raise_failure(self) -> None:
        """What ended training, if something did: after a flush all ranks know it, and the same."""
        if self.stop_request.is_agreed and self.stop_request.reason != FAILURE:
            return  # saving flushes
        try:
            self.recorder.flush()
            self._call("on_failure")
        except ToolkitError:
            if self._failure is None:  # else a consequence
                raise
        if self._failure is not None:
            raise self._failure
        if self.stop_request.is_agreed:
            raise LostPeerError("another rank has failed; its message and its log say why")

    def _train_step(self, batch: dict[str, torch.Tensor]) -> None:
        size = self.tokens_per_step
        progress = Progress(self.step, self.tokens, self.total_steps, self.total_tokens, size)
        self.step += 1
        self.tokens += self.tokens_per_step
        is_first = self.step == self._first_step  # it compiles
        self.heartbeat.beat("forward and backward", self.step, is_slow=is_first)
        for hook in self._pre_step:
            hook()
        metrics = self.train_module.train_batch(batch)
        self.heartbeat.beat("optimizer step", self.step, is_slow=is_first)
        for hook in self._pre_optim_step:
            hook()
        metrics |= self.train_module.optim_step(progress)
        for hook in self._post_step:
            metrics |= hook() or {}
        values: dict[str, Any] = {
            "tokens": self.tokens,
            "epoch": self.train_loader.epochs_done(self.step),
            "time": time.time(),
            "attempt": self.run.attempt,
        }
        for source, count in self.train_loader.counts(self.step).items():
            values[f"instances/{source}"] = count
        reductions: dict[str, Any] = {}
        for name, metric in metrics.items():
            values[name] = metric.value
            if metric.reduction != "none":
                reductions[name] = metric.reduction
        self.recorder.record(self.step, values, reductions)
        for label, hook in self._post_record:
            self.heartbeat.beat(label, self.step, is_slow=True)
            hook()
        while self._deferred:
            self._deferred.pop()()

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows the current one."""
        return self.step >= self.stop_step

    def fail(self, error: ToolkitError) -> None:
        """End training with `error` at the next step that all ranks agree on; any thread may call
        it."""
        if self._failure is None:
            self._failure = error
        self.stop_request.ask(FAILURE)

    def after_callbacks(self, action: Callable[[], None]) -> None:
        """Run `action` once, after the remaining callbacks of this step."""
        self._deferred.append(action)

    def record_eval(self, result: dict[str, Any]) -> None:
        """Record the result of an evaluation, the same on every rank, at the current step."""
        self.last_eval = {"step": self.step, **result}
        self.recorder.record(self.step, result, stream="eval")

    def state_dict(self) -> dict[str, Any]:
        """Counters, data position and callbacks' state: plain values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_in_a_row": self.skipped_in_a_row,
            "data": self.train_loader.state_dict(),
            "callbacks": {name: c.state_dict() for name, c in self.callbacks.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`; called before `pre_train`."""
        self.train_loader.load_state_dict(state["data"])
        if self.train_loader.notice is not None and self.environment.is_main:
            log.info("%s", self.train_loader.notice)
        self.step, self.tokens = state["step"], state["tokens"]
        self._plan_steps()
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        for name, saved in state["callbacks"].items():
            if saved and name in self.callbacks:
                self.callbacks[name].load_state_dict(saved)

    def _open_metrics(self, *, resumed: bool) -> None:
        self.streams = MetricStreams(
            self.run.folder,
            resume_step=self.step if resumed else None,
            is_main=self.environment.is_main,
        )
        is_several = self.environment.world_size > 1
        self.recorder = MetricsRecorder(
            collect_interval=self.config.metrics_collect_interval,
            deliver=self._deliver,
            reduce=self.environment.reduce_columns if is_several else None,
            sync=self.streams.sync,
            start_step=self.step if resumed else -1,
        )

    def _deliver(self, stream: str, records: list[dict[str, Any]]) -> None:
        """Reduced records, in the metrics thread: derive, write, tell the callbacks."""
        self.run.check_owner_after_pause()
        if (removed := self.run.find_removal()) is not None:
            self.fail(removed)
            return
        if stream == "train":
            for record in records:
                record["ppl"] = math.exp(min(record["loss"], 700.0))
                record["skipped"] = int(record["skipped"])
                self._watch_skipped(record)
            self._last_loss = records[-1]["loss"]
            self._update_status(records[-1])
        self.streams.write(stream, records)
        for hook in self._on_metrics:
            hook(stream, records)

    def _watch_skipped(self, record: dict[str, Any]) -> None:
        if not record["skipped"]:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        step = record["step"]
        record["instances"] = self.train_loader.instance_indices(step - 1).tolist()
        log.warning(
            "step %d skipped: loss %s, grad_norm %s is not finite; its batch is instances %s of "
            "the training data",
            step, record["loss"], record["grad_norm"], record["instances"],
        )  # fmt: skip
        limit = self.train_module.max_consecutive_skipped_steps
        if self.skipped_in_a_row >= limit:
            self.fail(
                TrainingError(
                    f"step {step}: {limit} steps in a row had a non-finite loss or gradient; lower "
                    "train_module.optim.lr, look at the data, or raise "
                    "train_module.max_consecutive_skipped_steps"
                )
            )

    def _update_status(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.environment.is_main and now - self._status_at > STATUS_SECONDS:
            self._status_at = now
            self.run.set_status(
                "running", step=record["step"], tokens=record["tokens"], loss=record["loss"]
            )

    def _plan_steps(self) -> None:
        """Where training ends, seen from the current step: batches may have had another size
        before it."""
        self.total_steps = self._steps_of("max_duration")
        self.total_tokens = self.tokens + (self.total_steps - self.step) * self.tokens_per_step
        stop = self._steps_of("hard_stop") if self.config.hard_stop else self.total_steps
        self.stop_step = min(stop, self.total_steps)

    def _steps_of(self, name: str) -> int:
        duration: Duration = getattr(self.config, name)
        try:
            return self.train_loader.steps_of(duration.value, duration.unit)
        except ValueError as error:
            raise ConfigError(f"trainer.{name}: {error}") from None

    def _hooks(self, name: str) -> list[Callable[..., Any]]:
        unchanged = getattr(Callback, name)
        return [
            getattr(callback, name)
            for callback in self.callbacks.values()
            if getattr(type(callback), name) is not unchanged
        ]

    def _labelled_hooks(self, name: str) -> list[tuple[str, Callable[..., Any]]]:
        """With the name of the callback, for who looks at the heartbeat."""
        return [
            (type(getattr(hook, "__self__", hook)).__name__, hook) for hook in self._hooks(name)
        ]

    def _call(self, name: str) -> None:
        for label, hook in self._labelled_hooks(name):
            self.heartbeat.beat(f"{label}.{name}", self.step, is_slow=True)
            hook()
