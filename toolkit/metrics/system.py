"""The machine a run uses, sampled by a background thread."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.threads import Thread

log = logging.getLogger(__name__)

_FIRST_SAMPLE_SECONDS = 1.0
"""Rates need two looks; the first sample comes early, so that short runs have one."""


class SystemMonitor:
    """Calls `write` with one flat record of numbers every `interval_seconds`.

    Percentages are of the whole machine except `process_cpu_pct` (100 = one core). Memory and
    disk are in GB (1e9 bytes), rates in MB/s (1e6 bytes). GPUs are those NVML sees; a machine
    without has no such columns. A record starts with "step", as `current_step` tells it (if given),
    and "time" in Unix seconds.

    A failing `write` ends the monitor with a warning; it never ends a run.
    """

    def __init__(
        self,
        interval_seconds: float,
        write: Callable[[dict[str, Any]], None],
        disk_path: Path | str,
        *,
        current_step: Callable[[], int] | None = None,
    ) -> None:
        self._interval = interval_seconds
        self._write = write
        self._current_step = current_step
        self._disk_path = str(disk_path)
        self._stop = threading.Event()
        self._thread = Thread(target=self._work, name="system-monitor", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; does not wait for the interval. More than once is fine."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _work(self) -> None:
        try:
            sampler = _Sampler(self._disk_path)
            pause = min(self._interval, _FIRST_SAMPLE_SECONDS)
            while True:
                stopping = self._stop.wait(pause)
                head: dict[str, Any] = {"time": time.time()}
                if self._current_step is not None:
                    head = {"step": self._current_step()} | head
                self._write(head | sampler.sample())
                if stopping:
                    break
                pause = self._interval
            sampler.close()
        except Exception as error:
            log.warning("system monitor stopped: %s: %s", type(error).__name__, error)


class _Sampler:
    """Knows the counters of the last look, from which rates follow."""

    def __init__(self, disk_path: str) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self._disk_path = disk_path
        self._gpus = _NvidiaGpus()
        self._process.cpu_percent()
        psutil.cpu_percent()
        self._seen = time.monotonic()
        self._counters = self._read_counters()

    def sample(self) -> dict[str, float]:
        """Everything at this moment; rates and CPU percentages since the last call."""
        psutil = self._psutil
        memory = psutil.virtual_memory()
        values: dict[str, float] = {
            "cpu_pct": psutil.cpu_percent(),
            "process_cpu_pct": self._process.cpu_percent(),
            "process_memory_gb": self._process.memory_info().rss / 1e9,
            "memory_used_gb": (memory.total - memory.available) / 1e9,
            "memory_pct": memory.percent,
        }
        with contextlib.suppress(OSError):  # of a lost file system the run itself will tell
            values["disk_free_gb"] = psutil.disk_usage(self._disk_path).free / 1e9
        now, counters = time.monotonic(), self._read_counters()
        seconds = max(now - self._seen, 1e-3)
        for name, count in counters.items():
            if name in self._counters:
                values[f"{name}_mb_per_s"] = max(count - self._counters[name], 0) / 1e6 / seconds
        self._seen, self._counters = now, counters
        return values | self._gpus.sample()

    def close(self) -> None:
        """Give NVML back."""
        self._gpus.close()

    def _read_counters(self) -> dict[str, int]:
        counters: dict[str, int] = {}
        disk = self._psutil.disk_io_counters()
        if disk is not None:  # containers may hide disks
            counters |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        nics = self._psutil.net_io_counters(pernic=True) or {}
        real = [nic for name, nic in nics.items() if name != "lo"]
        counters["network_in"] = sum(nic.bytes_recv for nic in real)
        counters["network_out"] = sum(nic.bytes_sent for nic in real)
        return counters


class _NvidiaGpus:
    """The GPUs NVML sees; none on a machine without its driver."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no library, no driver, no permission: a machine without GPUs for us
            return
        self._nvml = pynvml
        for index in range(pynvml.nvmlDeviceGetCount()):
            self._handles.append(pynvml.nvmlDeviceGetHandleByIndex(index))

    def sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for index, handle in enumerate(self._handles):
            for name, read in self._readers().items():
                try:
                    values[f"gpu{index}_{name}"] = read(handle)
                except self._nvml.NVMLError:
                    continue  # not every card tells everything (MIG, vGPU)
        return values

    def close(self) -> None:
        if self._handles:
            self._handles = []
            self._nvml.nvmlShutdown()

    def _readers(self) -> dict[str, Callable[[Any], float]]:
        nvml = self._nvml
        return {
            "utilization_pct": lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu,
            "memory_used_gb": lambda h: nvml.nvmlDeviceGetMemoryInfo(h).used / 1e9,
            "temperature_c": lambda h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1e3,
        }
