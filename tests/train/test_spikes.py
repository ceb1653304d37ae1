"""Steps that are left out by selection: spikes, and fp16 gradients that overflow."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import build, global_batch, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.engine import StepOutcome
from toolkit.errors import ConfigError
from toolkit.optim.config import OptimConfig, SkipStepAdamWConfig
from toolkit.optim.loss_scale import LossScale
from toolkit.optim.spikes import SpikeDetector
from toolkit.train import stepping
from toolkit.train.module import Progress
from toolkit.train.transformer import TransformerTrainModule

CPU = torch.device("cpu")
OPTIM = SkipStepAdamWConfig(lr=1e-3, rolling_interval_length=6, sigma_factor=6)


def detector(values: list[tuple[float, float]], length: int = 6) -> SpikeDetector:
    found = SpikeDetector(length, 2.0, device=CPU)
    for loss, norm in values:
        found.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(0.0))
    return found


def judge(found: SpikeDetector, loss: float, norm: float) -> bool:
    return bool(found.is_spike(torch.tensor(loss), torch.tensor(norm)))


def test_a_spike_is_above_mean_and_deviations_of_the_window_alone() -> None:
    values = [(9.0, 9.0)] * 3 + [(1.0 + 0.1 * i, 2.0 - 0.1 * i) for i in range(6)]
    found = detector(values)
    for column, name in ((0, "loss"), (1, "norm")):
        window = torch.tensor([v[column] for v in values[-6:]])
        limit = float(window.mean() + 2 * window.std())
        for value, expected in ((limit - 1e-3, False), (limit + 1e-3, True), (-5.0, False)):
            given = (value, 1.0) if name == "loss" else (1.0, value)
            assert judge(found, *given) is expected, (name, value)
    assert judge(found, math.nan, 1.0)
    assert judge(found, 1.0, math.inf)


def test_nothing_is_a_spike_before_half_of_the_window() -> None:
    assert not judge(detector([(1.0, 1.0)] * 2), 1e9, 1e9)
    assert judge(detector([(1.0, 1.0)] * 3), 1e9, 1.0)


def test_skipped_steps_do_not_enter_and_a_copy_goes_on_alike() -> None:
    found = detector([(1.0, 1.0), (1.1, 0.9), (0.9, 1.1), (1.0, 1.2)])
    before = found.state_dict()
    found.add(torch.tensor(1e9), torch.tensor(math.nan), torch.tensor(1.0))
    assert all(torch.equal(before[k], v) for k, v in found.state_dict().items())
    twin = SpikeDetector(6, 2.0, device=CPU)
    twin.load_state_dict(before)
    for step in range(9):
        given = torch.tensor(1.0 + step / 50), torch.tensor(1.0 - step / 50)
        assert torch.equal(found.is_spike(*given), twin.is_spike(*given))
        found.add(*given, torch.tensor(0.0))
        twin.add(*given, torch.tensor(0.0))
    assert all(torch.equal(twin.state_dict()[k], v) for k, v in found.state_dict().items())


def test_a_step_without_targets_does_not_enter() -> None:
    found = detector([(1.0, 1.0)] * 3)
    before = found.state_dict()
    found.add(torch.tensor(math.nan), torch.tensor(0.0), torch.tensor(0.0))
    assert all(torch.equal(before[k], v) for k, v in found.state_dict().items())


def test_a_window_of_another_length_keeps_its_newest_steps() -> None:
    values = [(float(i), float(-i)) for i in range(9)]
    shorter = SpikeDetector(4, 2.0, device=CPU)
    shorter.load_state_dict(detector(values).state_dict())
    assert shorter.state_dict()["values"][0].tolist() == [5.0, 6.0, 7.0, 8.0]


def spiking(kind: str) -> Any:
    """A forward whose loss (and gradient, of `kind` "both") is 1,000 times as large."""

    def change(module: TransformerTrainModule) -> Any:
        forward = module.engine.module.forward

        def changed(*args: Any, **kwargs: Any) -> Any:
            sums = forward(*args, **kwargs)
            loss = sums.loss * 1000 if kind == "both" else sums.loss
            return sums._replace(ce=sums.ce * 1000, loss=loss)

        module.engine.module.forward = changed
        return forward

    return change


def run_with_spike(engine: str, kind: str, optim: OptimConfig = OPTIM) -> tuple[Any, Any]:
    """Steps 0 to 3, a spike, then 4 to 6, and the same without the spike in a fresh module that
    takes over the state after step 3."""
    config = module_config(engine, optim=optim)
    env = open_environment(config)
    try:
        module = build(config, env)
        history = train_steps(module, 0, 4)
        window = module.extra_state()
        forward = spiking(kind)(module)
        history += train_steps(module, 8, 9)
        module.engine.module.forward = forward
        same = module.extra_state()["spikes"]
        assert all(torch.equal(same[k], v) for k, v in window["spikes"].items())
        history += train_steps(module, 4, 7)
        plain = build(config, env)
        expected = train_steps(plain, 0, 4)
        plain.load_extra_state(window)
        return history, expected + train_steps(plain, 4, 7)
    finally:
        env.close()


@pytest.mark.parametrize("kind", ["both", "loss"])
@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_spike_leaves_weights_and_moments_alone(
    workers: WorkerPool, engine: str, ranks: int, kind: str
) -> None:
    for history, expected in workers.run(ranks, run_with_spike, engine, kind):
        assert [record["skipped"] for record in history] == [0.0] * 4 + [1.0] + [0.0] * 3
        assert history[:4] + history[5:] == expected


@pytest.mark.parametrize("owns_loss", [True, False])
def test_ranks_add_up_a_copy_of_the_loss_in_one_type(
    monkeypatch: pytest.MonkeyPatch, owns_loss: bool
) -> None:
    added: list[torch.Tensor] = []
    double = lambda tensor: added.append(tensor.mul_(2).clone())  # noqa: E731
    monkeypatch.setattr(stepping.dist, "all_reduce", double)
    one = torch.ones(())
    module: Any = TransformerTrainModule.__new__(TransformerTrainModule)
    module.config = module_config(optim=OPTIM)
    module.environment = SimpleNamespace(owns_loss=owns_loss, world_size=2)
    module.engine = SimpleNamespace(step=lambda *_: StepOutcome(one, one))
    module._spikes = SpikeDetector(4, 2.0, device=CPU)
    for dtype in (torch.float32, torch.float64):
        module._loss = torch.tensor(3.0, dtype=dtype)
        module._step()
        assert module._loss == 3.0  # which is recorded
    assert [tensor.dtype for tensor in added] == [torch.float32] * 2
    assert added == [6.0 * owns_loss] * 2


def recorded_loss(engine: str) -> tuple[float, float]:
    """A rank's summand of the loss, as it is given and as it is recorded after the step."""
    config = module_config(engine, optim=OPTIM)
    env = open_environment(config)
    try:
        metric = (module := build(config, env)).train_batch({"input_ids": global_batch(env.rank)})
        given = float(metric["loss"].value)
        module.optim_step(Progress(0, 0, 8, 8, 1))
        return given, float(metric["loss"].value)
    finally:
        env.close()


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_the_sum_that_judges_a_step_leaves_the_record_as_it_was(
    workers: WorkerPool, engine: str
) -> None:
    for given, recorded in workers.run(2, recorded_loss, engine):
        assert given == recorded


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeed_leaves_out_spikes(workers: WorkerPool, engine: str) -> None:
    for history, expected in workers.run(2, run_with_spike, engine, "both"):
        assert [record["skipped"] for record in history] == [0.0] * 4 + [1.0] + [0.0] * 3
        assert history[:4] + history[5:] == expected


def test_the_scale_halves_at_once_and_grows_after_an_interval() -> None:
    scale = LossScale(CPU, initial=8.0, interval=3)
    seen = []
    for is_finite in (True, False, True, True, True, True, True, True, False):
        scale.update(torch.tensor(is_finite))
        seen.append(scale.scale.item())
    assert seen == [8, 4, 4, 4, 8, 8, 8, 16, 8]
    twin = LossScale(CPU)
    twin.load_state_dict(scale.state_dict())
    assert twin.state_dict() == scale.state_dict()


def fp16_steps(engine: str, precision: str) -> tuple[list[dict[str, float]], list[float]]:
    config = module_config(engine, precision=precision)
    env = open_environment(config)
    try:
        module = build(config, env)
        if precision == "fp32":
            return train_steps(module, 0, 4), []
        history = train_steps(module, 0, 2)
        assert module._loss_scale is not None
        scales = [module._loss_scale.scale.item()]
        module._loss_scale.scale.fill_(2.0**40)  # no gradient of fp16 can hold it
        before = {k: v.detach().clone() for k, v in module.state_tensors().items()}
        overflow = train_steps(module, 7, 8)
        assert overflow[0]["skipped"] == 1.0
        assert all(torch.equal(before[k], v) for k, v in module.state_tensors().items())
        scales.append(module._loss_scale.scale.item())
        module._loss_scale.scale.fill_(1024.0)
        return history + train_steps(module, 2, 4), scales
    finally:
        env.close()


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_fp16_trains_like_fp32_and_overflows_are_skipped(
    workers: WorkerPool, engine: str, ranks: int
) -> None:
    found, scales = workers.run(ranks, fp16_steps, engine, "fp16")[0]
    expected, _ = workers.run(ranks, fp16_steps, engine, "fp32")[0]
    assert scales == [65_536.0, 2.0**24]
    assert found != expected
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_fp16_under_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 does not go with zero2; use ddp, fsdp or hsdp"):
        open_environment(module_config("zero2", precision="fp16"))
