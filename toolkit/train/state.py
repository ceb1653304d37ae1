"""`TrainState`: where training stands. Callbacks, saving and restoring see it."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from toolkit.checkpoint.folder import CALLBACK_PREFIX
from toolkit.checkpoint.host_copy import HostCopy
from toolkit.checkpoint.plain import plain_state
from toolkit.data.evaluation import EvalLoader
from toolkit.data.loader import TrainLoader
from toolkit.errors import CheckpointError, ToolkitError, TrainingError
from toolkit.launch.stopping import stop_request_of
from toolkit.launch.watchdog import Heartbeat
from toolkit.metrics.recorder import MetricsRecorder
from toolkit.metrics.streams import MetricStreams
from toolkit.runs.manager import RunManager
from toolkit.runs.status import FAILURE, FINISH
from toolkit.train.config import TrainerConfig
from toolkit.train.module import Progress, TrainModule
from toolkit.train.scores import check_metrics, check_result, scores_of
from toolkit.train.timeline import Timeline

log = logging.getLogger(__name__)


class TrainState:
    """Counters, parts and requests of one training; the same on all ranks at the same step.

    Callbacks read the counters and act through `record`, `record_eval`, `should_stop`, `stop`,
    `finish` and `fail`.
    """

    def __init__(
        self,
        config: TrainerConfig,
        train_module: TrainModule,
        train_loader: TrainLoader,
        eval_loaders: Mapping[str, EvalLoader],
        run: RunManager,
        callbacks: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.train_module = train_module
        self.train_loader = train_loader
        self.eval_loaders = dict(eval_loaders)
        self.environment = train_module.environment
        self.run = run
        self.step = 0
        """The current step: the number of steps done between steps, of this one within it."""
        self.tokens = 0
        """Tokens consumed, those of the current step among them."""
        self.tokens_per_step = train_loader.batches.batch_tokens(0)
        """Of the current step."""
        self.step_started = 0.0
        """When the loop turned to the current step, before it waited for data (`perf_counter`)."""
        self.data_seconds = 0.0
        """How long the current step waited for data."""
        self.saved_step: int | None = None
        """The newest checkpoint of this run."""
        self.copying: HostCopy | None = None
        """Of a checkpoint in the background, which may not have copied all tensors yet."""
        self.steps_in_use: set[int] = set()
        """Checkpoints that somebody reads: they are not removed meanwhile."""
        self.last_eval: dict[str, Any] | None = None
        """The newest result of `lm_evaluator`; other evaluations are only recorded."""
        self.last_scores: dict[str, float] = {}
        """Of the same evaluation, all sets of rows: "val/loss"."""
        self._evaluations: dict[str, dict[str, Any]] = {}
        self._evaluated_at = -1
        self.last_loss: float | None = None
        self.skipped_in_a_row = 0
        self.failure: ToolkitError | None = None
        self.finish_reason: str | None = None
        """Why the run is complete before `total_steps`."""
        self.asked_to_finish: str | None = None
        """The same, until all ranks agree."""
        self.also_evaluated: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
        """Further weights that evaluations score: what is added to the name of the evaluation
        ("_ema"), and how the model holds them for the time of a block."""
        self.exported_weights: str | None = None
        """The callback whose averages exports take in the place of the weights."""
        self.recorder: MetricsRecorder = None  # type: ignore[assignment]
        """Set before `pre_train`, like `streams`."""
        self.streams: MetricStreams = None  # type: ignore[assignment]
        self.heartbeat = Heartbeat()
        self.stop_request = stop_request_of(
            run.folder,
            is_main=self.is_main,
            max_wall_time=config.max_wall_time,
            margin=config.wall_time_margin,
            stop_file=config.stop_file,
        )
        self.saved_callbacks: dict[str, Any] = {}
        """Their state in the checkpoint that was loaded."""
        self._callbacks = callbacks
        self.plan_steps()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.environment.is_main

    @property
    def has_own_parts(self) -> bool:
        """Whether a callback, or the train module, is the user's own."""
        parts = (self.train_module, *self._callbacks.values())
        return not all(type(part).__module__.startswith("toolkit.") for part in parts)

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows the current one."""
        return self.step >= self.stop_step

    @property
    def scores(self) -> dict[str, float]:
        """What evaluations at the current step gave, by names like "val/loss"."""
        is_current = self.last_eval is not None and self.last_eval["step"] == self.step
        scores = self.last_scores if is_current else {}
        return {**scores, **scores_of(self.evaluations.values())}

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The results recorded at the current step, by the names of the evaluations."""
        return self._evaluations if self._evaluated_at == self.step else {}

    @property
    def evaluated_weights(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """What an evaluation scores, one after the other: what is added to its name, and how the
        model holds the weights for the time of a block. The first are the model's own."""
        return {"": self.train_module.evaluating, **self.also_evaluated}

    def record(
        self, stream: str, values: Mapping[str, Any], reductions: Mapping[str, Any] | None = None
    ) -> None:
        """Write `values` of the current step to a stream of metrics ("network", "system"); every
        rank calls it with the same names. Tensors hold one element. `reductions` as in `Metric`;
        without one a value is the same on every rank. What is recorded before the step's own
        record is one line."""
        self.recorder.add(
            self.step,
            values,
            reductions,
            stream=stream,
            shared={"tokens": self.tokens, "time": time.time()},
        )

    def check_metrics(self) -> None:
        """Raise ConfigError where no evaluation gives what a setting names."""
        results = self.train_module.eval_results
        check_metrics(
            self.config, self.eval_loaders, has_own_parts=self.has_own_parts, results=results
        )

    def record_eval(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result of an evaluation, the same on every rank, to eval.jsonl; the record.
        Raises ConfigError: a setting asks for a result that it does not have."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        check_result(self.config, name, values)
        result = {"tokens": self.tokens, "time": time.time(), "name": name, **values}
        self.recorder.record(self.step, result, stream="eval")
        record = {"step": self.step, **result}
        self._evaluations = {**self.evaluations, name: record}
        self._evaluated_at = self.step
        return record

    def should_stop(self) -> bool:
        """Whether all ranks stop now; long work between steps asks too. Every rank calls it."""
        self.heartbeat.count += 1
        return self.stop_request.poll(self.environment.cpu_group)

    def stop(self, reason: str) -> None:
        """End training with a checkpoint once all ranks agree; any rank and thread may ask."""
        self.stop_request.ask(reason)

    def finish(self, reason: str, *, is_agreed: bool = False) -> None:
        """End the run early as complete, with all that comes after the last step. Any rank and
        thread may ask, and training ends once all ranks agree, if steps are left then;
        `is_agreed`: every rank calls it between two steps, and no other step follows."""
        if is_agreed:
            self.finish_reason, self.stop_step = reason, self.step
        else:
            self.asked_to_finish = reason
            self.stop_request.ask(FINISH)

    def fail(self, error: Exception | str) -> None:
        """End training with `error` once all ranks agree; any thread may call it."""
        if self.failure is None:
            if not isinstance(error, ToolkitError):
                error = TrainingError(f"training was ended: {error}")
            self.failure = error
        self.stop_request.ask(FAILURE)

    def begin_step(self) -> Progress:
        """Count one step; where training stood before it."""
        batches = self.train_loader.batches
        self.tokens_per_step = batches.batch_tokens(self.step)
        before = Progress(
            self.step,
            self.tokens,
            self.total_steps,
            self.total_tokens,
            self.tokens_per_step,
            batches.epochs_done,
        )
        self.step += 1
        self.tokens += self.tokens_per_step
        return before

    def plan_steps(self) -> None:
        """Where training ends, seen from the current step: batches may have had another size
        before it."""
        batches = self.train_loader.batches
        timeline = Timeline.of(self.config, batches.steps_of)
        self.total_steps, self.stop_step = timeline.total_steps, timeline.stop_step
        left = batches.tokens_done(self.total_steps) - batches.tokens_done(self.step)
        self.total_tokens = self.tokens + left

    def state_dict(self) -> dict[str, Any]:
        """Counters, data position and callbacks' state, but of those whose state follows metrics:
        plain values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_in_a_row": self.skipped_in_a_row,
            "data": self.train_loader.state_dict(),
            "train_module": self._extra_state(),
            "callbacks": self.callback_states(follow_metrics=False),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`; called before `pre_train`."""
        self.train_loader.load_state_dict(state["data"])
        if self.train_loader.notice is not None and self.is_main:
            log.info("%s", self.train_loader.notice)
        self.step, self.tokens = state["step"], state["tokens"]
        self.plan_steps()
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.train_module.load_extra_state(state.get("train_module", {}))
        self.saved_callbacks = state["callbacks"]
        for name in self._callbacks:
            self.load_callback(name)

    def load_callback(self, name: str) -> None:
        """Give a callback what the checkpoint keeps for its name."""
        if saved := self.saved_callbacks.get(name):
            try:
                self._callbacks[name].load_state_dict(saved)
            except ToolkitError:
                raise
            except Exception as error:
                raise CheckpointError(
                    f"callback {name}: load_state_dict of the checkpoint at step {self.step}: "
                    f"{type(error).__name__}: {error}; under another name it starts afresh"
                ) from error

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of tensors: the train module's and the callbacks'."""
        return {**self.train_module.state_tensors(), **self.callback_tensors()}

    def wait_for_copies(self) -> None:
        """Before what `state_tensors` gives is changed: a checkpoint may still be copying it."""
        copying, self.copying = self.copying, None
        if copying is not None:
            copying.hold_back()

    def callback_tensors(self) -> dict[str, torch.Tensor]:
        """Callbacks' tensors under their names in checkpoints."""
        return {
            f"{CALLBACK_PREFIX}{name}.{key}": tensor
            for name, callback in self._callbacks.items()
            for key, tensor in callback.state_tensors().items()
        }

    def callbacks_filled(self, names: Collection[str]) -> None:
        """Tell callbacks which of `callback_tensors` a checkpoint has filled."""
        for name, callback in self._callbacks.items():
            prefix = f"{CALLBACK_PREFIX}{name}."
            if own := [n.removeprefix(prefix) for n in names if n.startswith(prefix)]:
                callback.state_filled(own)

    def callback_states(self, *, follow_metrics: bool) -> dict[str, Any]:
        """The states of callbacks of one kind; see `Callback.state_follows_metrics`."""
        callbacks = self._callbacks.items()
        names = (name for name, c in callbacks if c.state_follows_metrics == follow_metrics)
        return {name: self._state_of(name) for name in names}

    def _extra_state(self) -> dict[str, Any]:
        try:
            return plain_state(self.train_module.extra_state())
        except TypeError as error:
            problem = f"train module: extra_state at step {self.step}: {error}"
            raise TrainingError(problem) from error

    def _state_of(self, name: str) -> dict[str, Any]:
        try:
            # A copy: a thread may write it while training goes on.
            return plain_state(self._callbacks[name].state_dict())
        except ToolkitError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            problem = f"callback {name}: state_dict at step {self.step}: {what}"
            raise TrainingError(problem) from error
