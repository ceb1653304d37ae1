"""The machine's numbers from a background thread."""

import logging
import queue
import sys
import time

from toolkit.metrics.system import SystemMonitor


def test_samples_have_step_time_and_plausible_numbers(tmp_path):
    samples = queue.Queue()
    monitor = SystemMonitor(0.05, samples.put, tmp_path, current_step=lambda: 42)
    monitor.start()
    first, second = samples.get(timeout=10), samples.get(timeout=10)
    monitor.stop()
    assert list(first)[:2] == ["step", "time"]
    assert first["step"] == 42
    assert abs(second["time"] - time.time()) < 60
    assert second["time"] > first["time"]
    assert 0.001 < second["process_memory_gb"] < 1000
    assert 0 < second["memory_pct"] <= 100
    assert second["disk_free_gb"] > 0
    assert second["network_in_mb_per_s"] >= 0
    assert {"cpu_pct", "process_cpu_pct", "memory_used_gb", "network_out_mb_per_s"} <= set(second)
    assert all(isinstance(value, int | float) for value in second.values())


def test_stop_does_not_wait_for_the_interval_and_leaves_a_last_sample(tmp_path):
    samples = []
    monitor = SystemMonitor(3600, samples.append, tmp_path)
    monitor.start()
    monitor.stop()
    monitor.stop()
    assert not monitor._thread.is_alive()
    assert len(samples) == 1


def test_stop_before_start_is_fine(tmp_path):
    SystemMonitor(1, lambda _: None, tmp_path).stop()


def test_a_machine_without_gpu_library_has_no_gpu_columns(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    samples = []
    monitor = SystemMonitor(3600, samples.append, tmp_path)
    monitor.start()
    monitor.stop()
    assert not [name for name in samples[0] if name.startswith("gpu")]


def test_gpu_columns_skip_what_a_card_does_not_tell(tmp_path, monkeypatch):
    class Nvml:
        """Two cards; the second does not tell its power."""

        class NVMLError(Exception):
            pass

        class Reading:
            gpu, used = 75, 2_000_000_000

        NVML_TEMPERATURE_GPU = 0
        nvmlInit = nvmlShutdown = staticmethod(lambda: None)
        nvmlDeviceGetCount = staticmethod(lambda: 2)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
        nvmlDeviceGetUtilizationRates = staticmethod(lambda handle: Nvml.Reading)
        nvmlDeviceGetMemoryInfo = staticmethod(lambda handle: Nvml.Reading)
        nvmlDeviceGetTemperature = staticmethod(lambda handle, kind: 61)

        @staticmethod
        def nvmlDeviceGetPowerUsage(handle):
            if handle == 1:
                raise Nvml.NVMLError("not supported")
            return 300_500

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    samples = []
    monitor = SystemMonitor(3600, samples.append, tmp_path)
    monitor.start()
    monitor.stop()
    gpu = {name: value for name, value in samples[0].items() if name.startswith("gpu")}
    common = {"utilization_pct": 75, "memory_used_gb": 2.0, "temperature_c": 61}
    expected = {f"gpu{i}_{name}": value for i in (0, 1) for name, value in common.items()}
    assert gpu == expected | {"gpu0_power_w": 300.5}


def test_a_failing_sink_ends_the_monitor_with_a_warning(tmp_path, caplog):
    def write(record):
        raise OSError("disk full")

    monitor = SystemMonitor(0.01, write, tmp_path)
    with caplog.at_level(logging.WARNING):
        monitor.start()
        monitor._thread.join(timeout=10)
    assert "system monitor stopped: OSError: disk full" in caplog.text
    monitor.stop()
