"""Throughput, MFU, waiting for data, memory."""

import resource
import sys
import time

import torch

from toolkit.metrics.flops import device_peak_flops
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import SpeedMonitorConfig
from toolkit.train.module import Metric


class SpeedMonitor(Callback):
    """Rates of each step, from where the loop turned to it: other callbacks are not in it.

    MFU = model FLOP/s / (devices * dense bf16 peak of one); see `flops_per_token` of the model for
    what is counted. It is absent where the peak is not known, as on CPUs.
    """

    def __init__(self, config: SpeedMonitorConfig) -> None:
        self._config = config
        self._per_token: float | None = None

    def pre_train(self) -> None:
        environment = self.state.environment
        peak = self._config.peak_flops
        if peak is None and environment.device.type == "cuda":
            peak = device_peak_flops(torch.cuda.get_device_name(environment.device))
        if peak is not None:
            length = self.state.train_loader.sequence_length
            flops = self.state.train_module.flops_per_token(length)
            self._per_token = flops / (peak * environment.world_size)

    def post_step(self) -> dict[str, Metric]:
        seconds = time.perf_counter() - self.state.step_started
        rate = self.state.tokens_per_step / seconds
        metrics = {
            "tokens_per_second": Metric(rate),
            "data_loading_pct": Metric(100.0 * self.state.data_seconds / seconds, "max"),
            "peak_memory_gb": Metric(_peak_memory_gb(self.state.environment.device), "max"),
        }
        if self._per_token is not None:
            metrics["mfu"] = Metric(rate * self._per_token)
        return metrics


def _peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated on the accelerator, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
