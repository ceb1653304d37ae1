"""What is different on Apple's GPUs, shown without one: which process takes it, that nothing there
is float64, and that kernels which heed neither clipping nor skips are not relied on."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import build, module_config, open_environment, train_steps
from tests.train.test_no_syncs import META, batch, on_meta  # noqa: F401
from toolkit.commands import doctor
from toolkit.distributed import devices, torch_engine
from toolkit.distributed.devices import device_name, pick_device, wait_for
from toolkit.distributed.environment import is_fast_at_bf16
from toolkit.errors import ConfigError
from toolkit.evaluate.tasks import scoring
from toolkit.metrics import recorder
from toolkit.models.kernels import attention_backend, fused_steps_are_told, widest_float
from toolkit.optim import spikes
from toolkit.optim.config import LionConfig, MuonConfig, OptimConfig, SGDConfig, SkipStepAdamWConfig
from toolkit.train.callbacks import rank_monitor
from toolkit.train.eval_sums import EvalSums, sum_batches
from toolkit.train.module import Progress

MPS = torch.device("mps")


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "unused_gpus", lambda: None)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_one_process_takes_the_gpu_and_two_the_cpu_with_one_line(
    mac: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert pick_device(0) == pick_device(0, 1) == MPS
    assert device_name(MPS).endswith(" GPU")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert {pick_device(rank, 2).type for rank in (0, 1)} == {"cpu"}
        assert pick_device(1).type == "cpu"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("2 processes train on this machine's CPU")


def test_the_cpu_can_be_asked_for(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert pick_device(0).type == "cpu"


@pytest.mark.parametrize("engine", ["fsdp", "zero1"])
def test_engines_that_shard_are_refused(mac: None, engine: str) -> None:
    with pytest.raises(ConfigError, match=f"{engine} does not train on Apple's GPU; take single"):
        open_environment(module_config(engine))


def test_what_is_chosen_by_the_device() -> None:
    assert (widest_float(MPS), widest_float(torch.device("cpu"))) == (torch.float32, torch.float64)
    assert not fused_steps_are_told(MPS)
    assert fused_steps_are_told(torch.device("cuda"))
    assert attention_backend(MPS, torch.float32, 64) == "sdpa"


def test_what_waits_for_the_device_is_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.mps` has neither streams nor events that block."""
    asked: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: asked.append("wait"))
    wait_for(MPS)

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            asked.append(f"timed {enable_timing}")

        def record(self) -> None:
            asked.append("record")

    monkeypatch.setattr(torch.mps, "Event", Event)
    rank_monitor._mark(MPS)
    assert asked == ["wait", "timed True", "record"]


class NoFloat64(TorchDispatchMode):
    """Fails where an operator makes a float64 tensor on `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.made = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self._device:
                self.made += 1
                assert leaf.dtype != torch.float64, operator
        return out


OPTIMIZERS = [SkipStepAdamWConfig(rolling_interval_length=4), LionConfig(), MuonConfig()]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: type(optim).__name__)
def test_a_step_makes_no_float64(
    on_meta: Any,  # noqa: F811
    optim: OptimConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spikes, "widest_float", lambda device: widest_float(MPS))
    module = on_meta({}, optim=optim, z_loss_multiplier=1e-4)
    with NoFloat64("meta") as mode:
        for step in range(2):
            module.train_batch(batch(masked=True))
            module.network_norms()
            module.optim_step(Progress(step, step, 100, 100, 1))
        with module.evaluating():
            module.eval_batch(batch())
    assert mode.made > 100


def test_the_check_finds_a_float64() -> None:
    wide = lambda: torch.zeros(2, device=META).double()  # noqa: E731
    for make in (wide, lambda: spikes.SpikeDetector(4, 2.0, device=META)):
        with pytest.raises(AssertionError, match="aten"), NoFloat64("meta"):
            make()


def test_evaluations_add_up_without_float64_and_give_one_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeTensorMode(), NoFloat64("mps") as mode:
        sums = EvalSums(torch.zeros((), device=MPS), torch.ones((), device=MPS, dtype=torch.int64))
        totals = sum_batches([{}, {}], lambda batch: sums)
        assert totals is not None
        assert (totals.dtype, totals.device.type) == (torch.float64, "cpu")
    assert mode.made > 3
    monkeypatch.setattr(scoring, "widest_float", lambda device: widest_float(MPS))
    places = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    tasks = scoring.Batch(torch.zeros(2, 8), [0, 1], *places, [2, 1])
    with NoFloat64("meta"):
        assert scoring._sums(tasks, torch.zeros(2, 8, 5, device=META)).dtype == torch.float32


def test_metrics_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(), NoFloat64("mps"):
        value = torch.zeros((), device=MPS)
        read = recorder._start_reading([recorder._Record("train", 1, {"loss": value}, {})])
    number = SimpleNamespace(device=MPS, item=lambda: 2.5)
    monkeypatch.setattr(recorder.torch, "Tensor", SimpleNamespace)
    record = recorder._Record("train", 1, {"loss": number}, {})
    assert recorder._start_reading([record])() == [{"loss": 2.5}]
    assert callable(read)


FUSED = [SkipStepAdamWConfig(lr=1e-2, rolling_interval_length=32), SGDConfig(lr=0.1, momentum=0.9)]


@pytest.mark.parametrize(
    "optim", [*FUSED, MuonConfig(lr=1e-2)], ids=lambda optim: type(optim).__name__
)
def test_clipping_and_skips_hold_where_fused_kernels_ignore_both(
    optim: OptimConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's kernels made as deaf as those for Apple's GPUs are."""
    expected = steps(optim)
    for name in ("_fused_adamw_", "_fused_sgd_"):
        whole = getattr(torch, name)

        def deaf(*args: Any, whole: Any = whole, **kwargs: Any) -> Any:
            return whole(*args, **{**kwargs, "grad_scale": None, "found_inf": None})

        monkeypatch.setattr(torch, name, deaf)
    monkeypatch.setattr(torch_engine, "fused_steps_are_told", lambda device: False)
    found = steps(optim)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert [record["skipped"] for record in found] == [0.0, 1.0, 0.0, 0.0]


def steps(optim: OptimConfig) -> list[dict[str, float]]:
    """Four, clipped hard; the gradients of the second are not finite."""
    config = module_config(optim=optim, max_grad_norm=0.05)
    env = open_environment(config)
    try:
        module = build(config, env)
        history = train_steps(module, 0, 1)
        forward = module.engine.module.forward
        poisoned = lambda *a, **k: (s := forward(*a, **k))._replace(loss=s.loss * float("nan"))  # noqa: E731
        module.engine.module.forward = poisoned
        history += [{"skipped": train_steps(module, 1, 2)[0]["skipped"]}]
        module.engine.module.forward = forward
        return history + train_steps(module, 2, 4)
    finally:
        env.close()


def test_doctor_names_the_gpu(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "Linear", lambda *a, device: torch.nn.modules.Linear(*a))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size) + 1)
    found = list(doctor._device())
    assert [finding.level for finding in found] == ["ok"]
    assert found[0].text.startswith("Apple's GPU (")
    precision = "bf16" if is_fast_at_bf16(MPS) else "fp32"
    assert f"`auto` is {precision}" in found[0].text
