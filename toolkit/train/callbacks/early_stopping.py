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

    Evaluations are the same on every rank, so ranks decide alike at the same step. Metrics of
    training arrive some steps later, in the metrics thread; ranks then agree as on any stop.
    """

    state_follows_metrics = True

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self._config = config
        self._name, _, self._of = config.metric.rpartition("/")
        self._best: float | None = None
        self._best_at = 0
        self._without = 0
        """Values in a row since the best."""
        self._seen_at = 0
        self._names: set[str] = set()
        """Of evaluations that there were."""

    def pre_train(self) -> None:
        if self._is_over:
            self._end(is_agreed=True)

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        if stream != "train" or self._name != "train" or self._is_over:
            return
        for record in records:
            self._take(record["step"], self._value_in(record))
            if self._is_over:
                self._end(is_agreed=False)
                return

    def post_record(self) -> None:
        evaluations, step = self.state.evaluations, self.state.step
        self._names |= evaluations.keys()
        if self._name in evaluations and step > self._seen_at and not self._is_over:
            self._take(step, self._value_in(evaluations[self._name]))
            if self._is_over:
                self._end(is_agreed=True)

    def post_train(self) -> None:
        if self._name != "train" and self._best is None and not self._without:
            there = ", ".join(sorted(self._names)) or "none"
            log.warning("%s: there was no evaluation %r (there were: %s)", _KEY, self._name, there)

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

    def _value_in(self, record: dict[str, Any]) -> float:
        if self._of not in record:
            known = ", ".join(f"{self._name}/{k}" for k, v in record.items() if _is_number(v))
            raise ConfigError(f"there is no {self._config.metric!r}; there are {known}", key=_KEY)
        return float(record[self._of])

    def _take(self, step: int, value: float) -> None:
        best, sign = self._best, 1.0 if self._config.mode == "min" else -1.0
        if not math.isnan(value) and (
            best is None or sign * (best - value) > self._config.min_delta
        ):
            self._best, self._best_at, self._without = value, step, 0
        else:
            self._without += 1
        self._seen_at = step

    def _end(self, *, is_agreed: bool) -> None:
        if self.state.is_main:
            values = count(self._without, "step" if self._name == "train" else "evaluation")
            best = "never a number" if self._best is None else f"{self._best:.6g}"
            log.info(
                "early_stopping: %s was not better by more than %g for %s (best: %s at step %d); "
                "training ends",
                self._config.metric, self._config.min_delta, values, best, self._best_at,
            )  # fmt: skip
        self.state.finish("early_stopping", is_agreed=is_agreed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
