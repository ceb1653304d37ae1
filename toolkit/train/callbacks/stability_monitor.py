"""Spikes of loss and gradient norm, with the batch that each came from."""

import logging
import math
import statistics
from collections import Counter, deque
from typing import Any

from toolkit.metrics.lines import JsonlSink, trim_jsonl
from toolkit.runs.files import RUN_FILES
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_monitors import StabilityMonitorConfig

log = logging.getLogger(__name__)

WATCHED = ("loss", "grad_norm")


class StabilityMonitor(Callback):
    """Compares each step with the mean and the standard deviation of the last ones, spikes not
    among them. Works in the metrics thread; training does not wait for it."""

    state_follows_metrics = True

    def __init__(self, config: StabilityMonitorConfig) -> None:
        self._config = config
        self._windows = {name: deque[float](maxlen=config.window) for name in WATCHED}
        self._file: JsonlSink | None = None

    def pre_train(self) -> None:
        if self.state.is_main:
            path = self.state.run.path(RUN_FILES.spikes)
            trim_jsonl(path, last_step=self.state.step)
            self._file = JsonlSink(path)

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        if stream == "train":
            for record in records:
                self._look(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def state_dict(self) -> dict[str, Any]:
        return {name: list(window) for name, window in self._windows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, window in self._windows.items():
            window.clear()
            window.extend(state[name])

    def _look(self, record: dict[str, Any]) -> None:
        scores = {name: self._score(name, record[name]) for name in WATCHED}
        spikes = {n: s for n, s in scores.items() if not s <= self._config.sigma_factor}
        for name in WATCHED:
            if name not in spikes:
                self._windows[name].append(record[name])
        if spikes:
            self._tell(record, spikes)

    def _score(self, name: str, value: float) -> float:
        """Standard deviations above the mean; 0 before there is enough to compare with."""
        window = self._windows[name]
        if not math.isfinite(value):
            return math.inf
        if len(window) < max(2, self._config.window // 2):
            return 0.0
        mean, deviation = statistics.fmean(window), statistics.stdev(window)
        above = value - mean
        return above / deviation if deviation else math.inf if above > 0 else 0.0

    def _tell(self, record: dict[str, Any], spikes: dict[str, float]) -> None:
        loader, step = self.state.train_loader, record["step"]
        indices = loader.instance_indices(step - 1).tolist()
        sources = Counter(loader.corpus.locate(index)[0] for index in indices)
        found: dict[str, Any] = {"step": step, "time": record["time"], "instances": indices}
        found |= {name: record[name] for name in WATCHED}
        found |= {f"{name}_sigmas": score for name, score in spikes.items()}
        if set(sources) != {None}:
            found["sources"] = dict(sources)
        if self._file is None:
            return
        self._file.write([found])
        what = ", ".join(
            f"{name} {record[name]:.4g} ({score:.1f} standard deviations above the last steps)"
            for name, score in spikes.items()
        )
        log.warning(
            "step %d: spike of %s; `toolkit batch %s %d` shows its documents",
            step, what, self.state.run.folder, step,
        )  # fmt: skip
