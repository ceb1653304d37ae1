"""A tracker during training: its process is started, told how training ended, and waited for."""

from typing import Any

from toolkit.runs.status import read_status
from toolkit.train.callbacks.base import Callback
from toolkit.train.trackers.config import TrackerConfig
from toolkit.train.trackers.process import SenderProcess
from toolkit.train.trackers.service import Outcome


class Tracker(Callback):
    """Sends what the run folder holds from a process of its own, on the main rank; nothing is done
    in a step."""

    def __init__(self, config: TrackerConfig) -> None:
        self._config = config
        self._process: SenderProcess | None = None
        self._outcome: Outcome = "failed"

    def pre_train(self) -> None:
        """Raises ConfigError where the library or credentials are missing."""
        if self.state.is_main:
            self._config.check()
            run = self.state.run
            self._process = SenderProcess(self._config, run.folder, attempt=run.attempt)

    def post_train(self) -> None:
        self._outcome = "finished"

    def on_stop(self) -> None:
        self._outcome = "stopped"

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            status: Any = read_status(self.state.run.folder)
            has_failed = status is not None and status.state == "failed"
            process.end("failed" if has_failed else self._outcome)
