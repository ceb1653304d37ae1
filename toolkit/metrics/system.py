"""The machine a run uses, sampled by a background thread."""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from toolkit.threads import Thread

log = logging.getLogger(__name__)

_FIRST_SAMPLE_SECONDS = 1.0
"""Rates need two looks; the first sample comes early, so that short runs have one."""


class SystemMonitor:
    """Calls `write` with one flat record of numbers every `interval_seconds`.

    Percentages are of the whole machine except `process_cpu_pct` (100 = one core). Memory and
    disk are in GB (1e9 bytes), rates in MB/s (1e6 bytes). Only GPUs that NVML sees have columns. A
    record starts with "step", if `current_step` tells it, and "time" in Unix seconds. A `write`
    that fails ends the monitor with a warning, never the run.
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
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; does not wait for the interval. More than once is fine."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _work(self) -> None:
        try:
            samples = _samples(self._disk_path)
            next(samples)
            pause = min(self._interval, _FIRST_SAMPLE_SECONDS)
            while True:
                stopping = self._stop.wait(pause)
                head = {} if self._current_step is None else {"step": self._current_step()}
                self._write({**head, "time": time.time(), **next(samples)})
                if stopping:
                    break
                pause = self._interval
            samples.close()
        except Exception as error:
            log.warning("system monitor stopped: %s: %s", type(error).__name__, error)


def _samples(disk_path: str) -> Generator[dict[str, float], None, None]:
    """Everything at the moment it is asked for; rates and CPU percentages since the time before,
    so the first is empty."""
    import psutil

    process = psutil.Process()
    process.cpu_percent()
    psutil.cpu_percent()
    values: dict[str, float] = {}
    with _gpu_sampler() as sample_gpus:
        seen, counters = time.monotonic(), _counters()
        while True:
            yield values
            memory = psutil.virtual_memory()
            values = {
                "cpu_pct": psutil.cpu_percent(),
                "process_cpu_pct": process.cpu_percent(),
                "process_memory_gb": process.memory_info().rss / 1e9,
                "memory_used_gb": (memory.total - memory.available) / 1e9,
                "memory_pct": memory.percent,
            }
            with contextlib.suppress(OSError):  # of a lost file system the run itself will tell
                values["disk_free_gb"] = psutil.disk_usage(disk_path).free / 1e9
            seen_before, before = seen, counters
            seen, counters = time.monotonic(), _counters()
            seconds = max(seen - seen_before, 1e-3)
            for name in counters.keys() & before.keys():
                moved = max(counters[name] - before[name], 0)
                values[f"{name}_mb_per_s"] = moved / 1e6 / seconds
            values |= sample_gpus()


def _counters() -> dict[str, int]:
    """Bytes since the machine started."""
    import psutil

    counters: dict[str, int] = {}
    disk = psutil.disk_io_counters()
    if disk is not None:  # containers may hide disks
        counters |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
    nics = psutil.net_io_counters(pernic=True) or {}
    real = [nic for name, nic in nics.items() if name != "lo"]
    counters["network_in"] = sum(nic.bytes_recv for nic in real)
    counters["network_out"] = sum(nic.bytes_sent for nic in real)
    return counters


@contextlib.contextmanager
def nvml_gpus() -> Iterator[tuple[Any, list[Any]]]:
    """The module `pynvml` and its handles of the GPUs it sees: none without its driver."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: a machine without GPUs for us
        yield None, []
        return
    try:
        yield nvml, [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


@contextlib.contextmanager
def _gpu_sampler() -> Iterator[Callable[[], dict[str, float]]]:
    """What tells of the GPUs that NVML sees."""
    readers: dict[str, Callable[[Any], float]] = {
        "utilization_pct": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "memory_used_gb": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9,
        "temperature_c": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    }

    def sample() -> dict[str, float]:
        values: dict[str, float] = {}
        for (index, gpu), name in itertools.product(enumerate(handles), readers):
            with contextlib.suppress(nvml.NVMLError):  # MIG and vGPU do not tell everything
                values[f"gpu{index}_{name}"] = readers[name](gpu)
        return values

    with nvml_gpus() as (nvml, handles):
        yield sample
