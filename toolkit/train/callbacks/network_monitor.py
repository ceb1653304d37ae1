"""Gradient and weight norms, global and per layer, into network.jsonl."""

from toolkit.train.callbacks.base import Callback
from toolkit.train.config import NetworkMonitorConfig


class NetworkMonitor(Callback):
    """Measured between backward and the optimizer, so both norms belong to the same weights."""

    def __init__(self, config: NetworkMonitorConfig) -> None:
        self._interval = config.interval

    def pre_optim_step(self) -> None:
        step = self.state.step
        if step % self._interval == 0 or step == 1:
            self.state.record("network", self.state.train_module.network_norms())
