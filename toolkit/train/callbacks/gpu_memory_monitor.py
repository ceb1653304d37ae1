"""What the CUDA allocator holds."""

import torch

from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_monitors import GPUMemoryMonitorConfig
from toolkit.train.module import Metric

_GIB = 2**30
_PEAKS = {
    "gpu_active_gib": "active_bytes.all.peak",
    "gpu_allocated_gib": "allocated_bytes.all.peak",
    "gpu_reserved_gib": "reserved_bytes.all.peak",
}
_COUNTS = {"gpu_alloc_retries": "num_alloc_retries", "gpu_ooms": "num_ooms"}


class GPUMemoryMonitor(Callback):
    """Peaks so far, in GiB, and how often the allocator had to empty its cache
    since the start: a number that grows costs time."""

    def __init__(self, config: GPUMemoryMonitorConfig) -> None:
        self._interval = config.interval

    def post_step(self) -> dict[str, Metric] | None:
        device = self.state.environment.device
        if device.type != "cuda" or self.state.step % self._interval:
            return None
        stats = torch.cuda.memory_stats(device)
        values = {name: stats.get(key, 0) / _GIB for name, key in _PEAKS.items()}
        values |= {name: stats.get(key, 0) for name, key in _COUNTS.items()}
        return {name: Metric(float(value), "max") for name, value in values.items()}
