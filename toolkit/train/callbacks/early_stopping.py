"""The end of a run whose metric no longer improves."""

import logging
import math
from typing import Any

from toolkit.errors import ConfigError
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import EarlyStoppingConfig
from toolkit.wording import count

log = logging.getLogger(__name__)

_KEY = "trainer.callbacks.early_stopping.metric"


class EarlyStopping(Callback):
    """Ends training as finished after `patience` values in a row that were not better than the best
    by more than `min_delta`. A value that is not a number is not better.

    After an evaluation all ranks do what rank 0 decides, at the same step. Metrics of training
    arrive some steps later, in the metrics thread; ranks then agree as on any stop.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self._config = config
        self._of_training = config.of_training
        self._evaluation, _, self._result = config.metric.rpartition("/")
        # Whose metrics change the state: an evaluation is taken in the thread that trains.
        self.state_follows_metrics = self._of_training is not None
        self._best: float | None = None
        self._best_at = 0
        self._without = 0
        """Values in a row since the best."""
        self._seen_at = -1
        self._is_missed = False
        """It was said that the metric has not come yet."""

    def pre_train(self) -> None:
        self.state.check_metrics()
        self._take_evaluation()  # which was broken off by a stop, or one before the first step
        self._end_if_over()

    def post_record(self) -> None:
        if self._take_evaluation():
            self._end_if_over()

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        name = self._of_training
        if stream != "train" or name is None or self._is_over:
            return
        for record in records:
            if name not in record:
                self._miss(record)
                continue
            self._take(record["step"], float(record[name]))
            if self._is_over:
                self._end(is_agreed=False)
                return

    def post_train(self) -> None:
        if self.state.is_main and not self._has_seen:
            log.warning("%s: there was no %s until the end", _KEY, self._config.metric)

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self._config.metric,
            "best": self._best,
            "best_at": self._best_at,
            "without": self._without,
            "seen_at": self._seen_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] == self._config.metric:
            self._best, self._best_at = state["best"], state["best_at"]
            self._without, self._seen_at = state["without"], state["seen_at"]

    @property
    def _is_over(self) -> bool:
        return self._without >= self._config.patience

    @property
    def _has_seen(self) -> bool:
        return self._best is not None or self._without > 0

    def _take_evaluation(self) -> bool:
        """Take what the current step's evaluation gave, once; whether there was one."""
        state = self.state
        found = {} if self._of_training is not None else state.evaluations
        if self._evaluation not in found:
            if found:
                self._say_missing(f"there are {', '.join(found)}")
            return False
        if state.step <= self._seen_at or self._is_over:
            return False
        self._take(state.step, float(found[self._evaluation][self._result]))
        return True

    def _take(self, step: int, value: float) -> None:
        best, sign = self._best, 1.0 if self._config.mode == "min" else -1.0
        if not math.isnan(value) and (
            best is None or sign * (best - value) > self._config.min_delta
        ):
            self._best, self._best_at, self._without = value, step, 0
        else:
            self._without += 1
        self._seen_at = step

    def _miss(self, record: dict[str, Any]) -> None:
        """A step without the metric, which some callbacks give now and then only."""
        numbers = (key for key, value in record.items() if isinstance(value, int | float))
        there = f"there are {', '.join(f'train/{key}' for key in numbers)}"
        callbacks = self.state.config.callbacks
        is_rare = callbacks.rank_monitor.enabled or callbacks.gpu_memory_monitor.enabled
        if not (self._has_seen or is_rare or self.state.has_own_parts):
            raise ConfigError(f"there is no {self._config.metric!r}; {there}", key=_KEY)
        self._say_missing(there)

    def _say_missing(self, there: str) -> None:
        if self.state.is_main and not (self._is_missed or self._has_seen):
            log.warning("%s: no %s yet; %s", _KEY, self._config.metric, there)
        self._is_missed = True

    def _end_if_over(self) -> None:
        if self.state.environment.broadcast(self._is_over):
            self._end(is_agreed=True)

    def _end(self, *, is_agreed: bool) -> None:
        if self.state.is_main:
            values = count(self._without, "evaluation" if self._of_training is None else "step")
            best = "never a number" if self._best is None else f"{self._best:.6g}"
            log.info(
                "early_stopping: %s was not better by more than %g for %s (best: %s at step %d); "
                "training ends",
                self._config.metric, self._config.min_delta, values, best, self._best_at,
            )  # fmt: skip
        self.state.finish("early_stopping", is_agreed=is_agreed)
