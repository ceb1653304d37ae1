"""`TrainState`: where training stands. Callbacks, saving and restoring see it."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from toolkit.data.evaluation import EvalLoader
from toolkit.data.loader import TrainLoader
from toolkit.errors import ToolkitError
from toolkit.launch.stopping import stop_request_of
from toolkit.launch.watchdog import Heartbeat
from toolkit.metrics.recorder import MetricsRecorder
from toolkit.metrics.streams import MetricStreams
from toolkit.runs.manager import RunManager
from toolkit.runs.status import FAILURE
from toolkit.train.config import TrainerConfig
from toolkit.train.module import Progress, TrainModule
from toolkit.train.timeline import Timeline

log = logging.getLogger(__name__)


class TrainState:
    """Counters, parts and requests of one training; the same on all ranks at the same step.

    Callbacks read the counters and act through `record`, `record_eval`, `should_stop`, `stop` and
    `fail`.
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
        self.tokens_per_step = train_loader.global_batch_size
        self.step_started = 0.0
        """When the loop turned to the current step, before it waited for data (`perf_counter`)."""
        self.data_seconds = 0.0
        """How long the current step waited for data."""
        self.saved_step: int | None = None
        """The newest checkpoint of this run."""
        self.last_eval: dict[str, Any] | None = None
        """The newest result of `lm_evaluator`; other evaluations are only recorded."""
        self.last_scores: dict[str, float] = {}
        """Of the same evaluation, all sets of rows: "val/loss"."""
        self.last_loss: float | None = None
        self.skipped_in_a_row = 0
        self.failure: ToolkitError | None = None
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
    def is_last_step(self) -> bool:
        """Whether no step follows the current one."""
        return self.step >= self.stop_step

    @property
    def scores(self) -> dict[str, float]:
        """What the evaluation at the current step gave, if there was one."""
        is_current = self.last_eval is not None and self.last_eval["step"] == self.step
        return self.last_scores if is_current else {}

    def record(
        self, stream: str, values: Mapping[str, Any], reductions: Mapping[str, Any] | None = None
    ) -> None:
        """Write `values` of the current step to a stream of metrics ("network", "system"); every
        rank calls it with the same names. Tensors hold one element. `reductions` as in `Metric`;
        without one a value is the same on every rank."""
        values = {"tokens": self.tokens, "time": time.time(), **values}
        self.recorder.record(self.step, values, reductions, stream=stream)

    def record_eval(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result of an evaluation, the same on every rank, to eval.jsonl; the record."""
        result = {"tokens": self.tokens, "time": time.time(), "name": name, **values}
        self.recorder.record(self.step, result, stream="eval")
        return {"step": self.step, **result}

    def should_stop(self) -> bool:
        """Whether all ranks stop now; long work between steps asks too. Every rank calls it."""
        self.heartbeat.count += 1
        return self.stop_request.poll(self.environment.cpu_group)

    def stop(self, reason: str) -> None:
        """End training with a checkpoint once all ranks agree; any rank and thread may ask."""
        self.stop_request.ask(reason)

    def fail(self, error: ToolkitError) -> None:
        """End training with `error` once all ranks agree; any thread may call it."""
        if self.failure is None:
            self.failure = error
        self.stop_request.ask(FAILURE)

    def begin_step(self) -> Progress:
        """Count one step; where training stood before it."""
        before = Progress(
            self.step, self.tokens, self.total_steps, self.total_tokens, self.tokens_per_step
        )
        self.step += 1
        self.tokens += self.tokens_per_step
        return before

    def plan_steps(self) -> None:
        """Where training ends, seen from the current step: batches may have had another size
        before it."""
        timeline = Timeline.of(self.config, self.train_loader.steps_of)
        self.total_steps, self.stop_step = timeline.total_steps, timeline.stop_step
        self.total_tokens = self.tokens + (self.total_steps - self.step) * self.tokens_per_step

    def state_dict(self) -> dict[str, Any]:
        """Counters, data position and callbacks' state: plain values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_in_a_row": self.skipped_in_a_row,
            "data": self.train_loader.state_dict(),
            "train_module": self.train_module.extra_state(),
            "callbacks": {name: c.state_dict() for name, c in self._callbacks.items()},
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
            self._callbacks[name].load_state_dict(saved)
