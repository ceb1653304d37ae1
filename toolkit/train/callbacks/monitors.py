"""What is measured besides the loss: speed, norms of the network, the machine; and Python's garbage
collection, which would spoil the first."""

import gc
import resource
import sys
import time

import torch

from toolkit.metrics import system
from toolkit.metrics.flops import device_peak_flops
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import (
    GarbageCollectorConfig,
    NetworkMonitorConfig,
    SpeedMonitorConfig,
    SystemMonitorConfig,
)
from toolkit.train.module import Metric


class SpeedMonitor(Callback):
    """Throughput, MFU, waiting for data and memory of each step, from where the loop turned to it:
    other callbacks are not in it.

    MFU = model FLOP/s / (devices * dense bf16 peak of one); see `flops_per_token` of the model for
    what is counted. It is absent where the peak is not known, as on CPUs.
    """

    def __init__(self, config: SpeedMonitorConfig) -> None:
        self._peak = config.peak_flops
        self._peak_flops: float | None = None
        self._flops: dict[int, float] = {}

    def pre_train(self) -> None:
        environment, peak = self.state.environment, self._peak
        if peak is None and environment.device.type == "cuda":
            peak = device_peak_flops(torch.cuda.get_device_name(environment.device))
        if peak is not None:
            self._peak_flops = peak * environment.world_size

    def post_step(self) -> dict[str, Metric]:
        seconds = time.perf_counter() - self.state.step_started
        rate = self.state.tokens_per_step / seconds
        metrics = {
            "tokens_per_second": Metric(rate),
            "data_loading_pct": Metric(100.0 * self.state.data_seconds / seconds, "max"),
            "peak_memory_gb": Metric(_peak_memory_gb(self.state.environment.device), "max"),
        }
        if self._peak_flops is not None:
            length = self.state.train_loader.batches.row_length(self.state.step - 1)
            if length not in self._flops:
                self._flops[length] = self.state.train_module.flops_per_token(length)
            if flops := self._flops[length]:  # 0: not known
                metrics["mfu"] = Metric(rate * flops / self._peak_flops)
        return metrics


def _peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated on the accelerator, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class NetworkMonitor(Callback):
    """Gradient and weight norms, global and per layer, into network.jsonl. Measured between
    backward and the optimizer, so both belong to the same weights."""

    def __init__(self, config: NetworkMonitorConfig) -> None:
        self._interval = config.interval

    def pre_optim_step(self) -> None:
        if self.state.step % self._interval == 0 or self.state.step == 1:
            self.state.record("network", self.state.train_module.network_norms())


class SystemMonitor(Callback):
    """The machine's numbers into system.jsonl: one sampling thread on the main rank; each sample
    carries the step it was taken at."""

    def __init__(self, config: SystemMonitorConfig) -> None:
        self._interval = config.interval_seconds
        self._sampler: system.SystemMonitor | None = None

    def pre_train(self) -> None:
        if self.state.is_main:
            self._sampler = system.SystemMonitor(
                self._interval,
                lambda sample: self.state.streams.write("system", [sample]),
                self.state.run.folder,
                current_step=lambda: self.state.step,
            )
            self._sampler.start()

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()


class GarbageCollector(Callback):
    """Automatic collection off during training: on many ranks it strikes at different steps, and
    each pause is everybody's pause."""

    def __init__(self, config: GarbageCollectorConfig) -> None:
        self._interval = config.interval
        self._was_enabled = gc.isenabled()

    def pre_train(self) -> None:
        gc.collect()
        gc.disable()

    def post_record(self) -> None:
        if self.state.step % self._interval == 0:
            gc.collect(1)

    def close(self) -> None:
        if self._was_enabled:
            gc.enable()
