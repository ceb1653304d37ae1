"""Speed and MFU, against a clock that is set by hand and a published run."""

from types import SimpleNamespace

import pytest
import torch

from toolkit.models.config import GPTConfig
from toolkit.models.presets import PRESETS
from toolkit.train.callbacks import monitors
from toolkit.train.callbacks.config import SpeedMonitorConfig
from toolkit.train.callbacks.monitors import SpeedMonitor


class Clock:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class State:
    """As much of it as the meter asks."""

    def __init__(self, *, flops: float, device: str, world_size: int, tokens: int) -> None:
        self.environment = SimpleNamespace(device=torch.device(device), world_size=world_size)
        batches = SimpleNamespace(row_length=lambda batch: 1024 if batch < 5 else 2048)
        self.train_loader = SimpleNamespace(batches=batches)
        self.train_module = SimpleNamespace(flops_per_token=lambda length: flops * length / 1024)
        self.step = 1
        self.tokens_per_step = tokens
        self.data_seconds = 0.0
        self.step_started = 100.0


def meter(monkeypatch, state: State, name: str = "", **config) -> tuple[SpeedMonitor, Clock]:
    clock = Clock()
    monkeypatch.setattr(monitors, "time", clock)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monitor = SpeedMonitor(SpeedMonitorConfig(**config))
    monitor.state = state
    monitor.pre_train()
    return monitor, clock


def test_rates_of_a_step_by_hand(monkeypatch):
    state = State(flops=2e9, device="cuda", world_size=4, tokens=1_000_000)
    monitor, clock = meter(monkeypatch, state, "NVIDIA A100-SXM4-80GB")
    clock.now += 2.0
    state.data_seconds = 0.5
    found = {name: metric.value for name, metric in monitor.post_step().items()}
    assert found == {
        "tokens_per_second": 500_000.0,
        "data_loading_pct": 25.0,
        "peak_memory_gb": 3.0,
        # 500,000 tokens/s * 2 GFLOP = 1 PFLOP/s, of 4 * 312 TFLOP/s.
        "mfu": pytest.approx(1000 / 1248),
    }
    state.step = 6  # rows twice as long, whose tokens cost twice as much here
    assert monitor.post_step()["mfu"].value == pytest.approx(2000 / 1248)


def test_time_of_callbacks_is_no_step_time(monkeypatch):
    state = State(flops=1.0, device="cpu", world_size=1, tokens=600)
    monitor, clock = meter(monkeypatch, state)
    for seconds_of_callbacks in (0.0, 50.0, 0.0):
        state.step_started = clock.now
        clock.now += 3.0
        assert monitor.post_step()["tokens_per_second"].value == 200.0
        clock.now += seconds_of_callbacks


@pytest.mark.parametrize(
    ("device", "name", "config", "peak"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", {}, 989e12),
        ("cuda", "NVIDIA H100 PCIe", {}, 756e12),
        ("cuda", "AMD Instinct MI250X", {}, 191.5e12),
        ("cuda", "NVIDIA A100-SXM4-80GB", {"peak_flops": 1e12}, 1e12),
        ("cpu", "", {"peak_flops": 1e12}, 1e12),
        ("cuda", "Tesla V100-SXM2-32GB", {}, None),
        ("cpu", "NVIDIA A100-SXM4-80GB", {}, None),
    ],
)
def test_the_peak_is_the_devices_or_the_one_given(monkeypatch, device, name, config, peak):
    state = State(flops=1e9, device=device, world_size=2, tokens=1000)
    monitor, clock = meter(monkeypatch, state, name, **config)
    clock.now += 1.0
    found = monitor.post_step()
    assert ("mfu" in found) == (peak is not None)
    if peak is not None:
        assert found["mfu"].value == pytest.approx(1000 * 1e9 / (2 * peak))


def test_mfu_of_a_published_run(monkeypatch):
    """GPT-2 124M on 8 H100 at 462,000 tokens/s each, published as 39.9%.

    By hand, at 1,024 tokens: matrices that a token uses, 12 * 12 * 768^2 = 84.9M in blocks and
    50,257 * 768 = 38.6M in the head, 6 FLOPs each: 741 MFLOP. Attention, as published, over all
    1,024 keys: 12 * 12 * 768 * 1024 = 113 MFLOP; as counted here, over the 512.5 that a token sees
    on average: 57 MFLOP.
    """
    matrices = 12 * 12 * 768**2 + 50_257 * 768
    published = 6 * matrices + 12 * 12 * 768 * 1024
    causal = 6 * matrices + 12 * 12 * 768 * 1025 / 2
    assert 462e3 * published / 989e12 == pytest.approx(0.399, abs=0.001)
    settings = {key: value for key, value in PRESETS["gpt2_124M"].items() if key != "type"}
    config = GPTConfig(**settings).to_transformer()
    assert config.flops_per_token(1024) == pytest.approx(causal)
    state = State(
        flops=config.flops_per_token(1024), device="cuda", world_size=8, tokens=8 * 462_000
    )
    monitor, clock = meter(monkeypatch, state, "NVIDIA H100 80GB HBM3")
    clock.now += 1.0
    assert monitor.post_step()["mfu"].value == pytest.approx(0.3727, abs=1e-4)
