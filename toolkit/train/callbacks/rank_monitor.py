"""Which rank the others wait for."""

import itertools
import logging
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_monitors import RankMonitorConfig
from toolkit.train.module import Metric

log = logging.getLogger(__name__)

_WIDTH = {"cuda": 4096, "cpu": 384}
_NOTICED_SECONDS = 1e-3
"""Less is not worth a warning, whatever the ratio."""


class RankMonitor(Callback):
    """Steps take the same time on every rank, as they wait for each other. So two things are timed
    in which they do not: waiting for data (the mean of the steps since the last measurement), and
    the product of two fixed matrices, the best of three, on the device behind the step before the
    one that is measured. Its processes then tell each other; the devices go on meanwhile.

    `data_seconds_max`, `data_slowest_rank`, `compute_seconds_max`, `compute_ratio` (slowest to
    median) and `compute_slowest_rank` join the step's record.
    """

    def __init__(self, config: RankMonitorConfig) -> None:
        self._config = config
        self._data_seconds: list[float] = []
        self._matrix: torch.Tensor | None = None
        self._seconds: Callable[[], float] = lambda: 0.0
        """What the computation took; waits for the device to have come to the last step."""

    def pre_train(self) -> None:
        self._compute_before_due()

    def post_step(self) -> dict[str, Metric] | None:
        self._data_seconds.append(self.state.data_seconds)
        if self.state.step % self._config.interval:
            self._compute_before_due()
            return None
        own = (statistics.fmean(self._data_seconds), self._seconds())
        self._compute_before_due()
        self._data_seconds.clear()
        data, compute = zip(*self._of_all(own), strict=True)
        median = statistics.median(compute)
        values = {
            "data_seconds_max": max(data),
            "data_slowest_rank": data.index(max(data)),
            "compute_seconds_max": max(compute),
            "compute_ratio": max(compute) / median,
            "compute_slowest_rank": compute.index(max(compute)),
        }
        self._warn("data", data)
        self._warn("a fixed computation", compute)
        return {name: Metric(value) for name, value in values.items()}

    def _of_all(self, own: tuple[float, float]) -> list[tuple[float, float]]:
        group = self.state.environment.cpu_group
        if group is None:
            return [own]
        mine = torch.tensor(own, dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(self.state.environment.world_size)]
        dist.all_gather(parts, mine, group=group)
        return [(data.item(), compute.item()) for data, compute in parts]

    def _compute_before_due(self) -> None:
        if (self.state.step + 1) % self._config.interval:
            return
        device = self.state.environment.device
        if self._matrix is None:
            width = _WIDTH.get(device.type, 384)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self._matrix = torch.ones(width, width, dtype=dtype, device=device)
        marks = [_mark(device)]
        for _ in range(3):
            self._matrix @ self._matrix
            marks.append(_mark(device))
        self._seconds = lambda: min(itertools.starmap(_seconds_between, itertools.pairwise(marks)))

    def _warn(self, what: str, seconds: tuple[float, ...]) -> None:
        slowest, median = max(seconds), statistics.median(seconds)
        if slowest < max(self._config.warn_ratio * median, _NOTICED_SECONDS):
            return
        rank = seconds.index(slowest)
        if self.state.environment.rank == rank and len(seconds) > 1:
            log.warning(
                "step %d: rank %d on %s waits %.1f ms for %s, the median rank %.1f ms",
                self.state.step, rank, socket.gethostname(), slowest * 1e3, what, median * 1e3,
            )  # fmt: skip


def _mark(device: torch.device) -> Any:
    """A point in time of the device, where what was asked of it so far is done."""
    if device.type == "cpu":
        return time.perf_counter()
    module = torch.get_device_module(device)
    event = module.Event(enable_timing=True, blocking=True)
    event.record(module.current_stream(device))
    return event


def _seconds_between(first: Any, second: Any) -> float:
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1e3
