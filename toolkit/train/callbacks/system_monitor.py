"""The machine's own numbers into system.jsonl."""

import time
from typing import Any

from toolkit.metrics.system import SystemMonitor as Sampler
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import SystemMonitorConfig


class SystemMonitor(Callback):
    """One sampling thread on the main rank; each sample carries the step it was taken at."""

    def __init__(self, config: SystemMonitorConfig) -> None:
        self._config = config
        self._sampler: Sampler | None = None

    def pre_train(self) -> None:
        if self.state.is_main:
            self._sampler = Sampler(
                self._config.interval_seconds, self._write, str(self.state.run.folder)
            )
            self._sampler.start()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()

    def _write(self, sample: dict[str, Any]) -> None:
        record = {"step": self.state.step, "time": time.time(), **sample}
        self.state.streams.write("system", [record])
