"""Optimizers against references in float64, and what they leave alone in a step not taken."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from toolkit.distributed.engine import create_state
from toolkit.optim.base import Optimizer
from toolkit.optim.config import (
    AdafactorConfig,
    AdamConfig,
    AdamW8bitConfig,
    AdamWConfig,
    LionConfig,
    NoopConfig,
    ScheduleFreeAdamWConfig,
)

SHAPES = {"blocks.0.up.weight": (5, 3), "head.norm.weight": (4,)}
RATES = (0.01, 0.02, 0.02, 0.005, 0.0, 0.01)


def weights(dtype: torch.dtype = torch.float64) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in SHAPES.items()}


def run(config: Optimizer, **flags: Any) -> dict[str, torch.Tensor]:
    named = weights()
    optimizer = config.build(named)
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, gradient in gradients(step).items():
            named[name].grad = gradient
        optimizer.step()
    if hasattr(optimizer, "show"):
        optimizer.show(average=flags.get("average", False))
    return {name: p.detach() for name, p in named.items()}


def adam(p: torch.Tensor, grads: list[torch.Tensor], decay: float) -> torch.Tensor:
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (rate, g) in enumerate(zip(RATES, grads, strict=True), 1):
        g = g + decay * p
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p = p - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    return p


def lion(p: torch.Tensor, grads: list[torch.Tensor], decay: float) -> torch.Tensor:
    m = torch.zeros_like(p)
    for rate, g in zip(RATES, grads, strict=True):
        p = p - rate * ((0.8 * m + 0.2 * g).sign() + decay * p)
        m = 0.9 * m + 0.1 * g
    return p


def schedule_free(p: torch.Tensor, grads: list[torch.Tensor], decay: float) -> torch.Tensor:
    x, z, v = p, p, torch.zeros_like(p)
    total = largest = 0.0
    for t, (rate, g) in enumerate(zip(RATES, grads, strict=True), 1):
        y = 0.2 * z + 0.8 * x
        v = 0.9 * v + 0.1 * g * g
        z = z - rate * (g / ((v / (1 - 0.9**t)).sqrt() + 1e-6) + decay * y)
        largest = max(largest, rate)
        weight = t * largest**2
        total += weight
        x = x + weight / total * (z - x)
    return x


def adafactor(p: torch.Tensor, grads: list[torch.Tensor], decay: float) -> torch.Tensor:
    r = c = v = torch.zeros((), dtype=p.dtype)
    for t, (rate, g) in enumerate(zip(RATES, grads, strict=True), 1):
        size = max(1e-3, p.square().mean().sqrt()) * min(rate, t**-0.5)
        p, keep = p * (1 - rate * decay), 1 - t**-0.8
        if p.dim() > 1:
            r = keep * r + (1 - keep) * g.square().mean(-1, keepdim=True)
            c = keep * c + (1 - keep) * g.square().mean(-2, keepdim=True)
            estimate = r * c / r.mean()
        else:
            estimate = v = keep * v + (1 - keep) * g * g
        update = g / estimate.sqrt()
        p = p - size * update / max(1.0, update.square().mean().sqrt())
    return p


ADAM: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (AdamConfig(**ADAM), adam),
        (LionConfig(betas=(0.8, 0.9), weight_decay=0.3), lion),
        (ScheduleFreeAdamWConfig(**ADAM, r=1.0), schedule_free),
        (AdafactorConfig(weight_decay=0.3), adafactor),
        (NoopConfig(lr=0.1), lambda p, grads, decay: p),
    ],
    ids=["adam", "lion", "schedule_free_adamw", "adafactor", "noop"],
)
def test_steps_are_those_of_a_reference(config: Optimizer, reference: Callable) -> None:
    found = run(config, average=True)
    for name, p in weights().items():
        grads = [gradients(step)[name] for step in range(len(RATES))]
        torch.testing.assert_close(
            found[name], reference(p.detach(), grads, 0.3), rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_state_that_was_made_weighs_nothing(power: float) -> None:
    optimizer = ScheduleFreeAdamWConfig(weight_lr_power=power).build(weights())
    create_state(optimizer, [group["params"] for group in optimizer.param_groups])
    for state in optimizer.state.values():
        assert not state["weight_sum"]
        assert not state["lr_max"]
        assert torch.equal(state["x"], state["z"])


def test_schedule_free_steps_are_those_of_its_authors() -> None:
    authors = pytest.importorskip("schedulefree")
    named = weights()
    options = {**ADAM, "r": 0.0, "weight_lr_power": 2.0}
    theirs = authors.AdamWScheduleFree(named.values(), **options)
    theirs.train()
    for step, rate in enumerate(RATES):
        theirs.param_groups[0]["lr"] = rate
        for name, gradient in gradients(step).items():
            named[name].grad = gradient
        theirs.step()
    config = ScheduleFreeAdamWConfig(**options)
    for average in (False, True):
        if average:
            theirs.eval()
        for name, found in run(config, average=average).items():
            torch.testing.assert_close(found, named[name].detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "config", [LionConfig(), ScheduleFreeAdamWConfig(weight_decay=0.1)], ids=["lion", "free"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_step_not_taken_changes_no_bit_and_a_scale_divides(
    config: Optimizer, first: bool
) -> None:
    named, twin = weights(torch.float32), weights(torch.float32)
    optimizer: Any = config.build(named)
    other: Any = config.build(twin)
    for step, is_taken in enumerate([*([] if first else [True]), False, True]):
        values = gradients(step, torch.float32)
        for name, gradient in values.items():
            named[name].grad = gradient * 4 if is_taken else gradient * float("nan")
            twin[name].grad = gradient.clone()
        before = {n: p.detach().clone() for n, p in named.items()}
        kept = copy.deepcopy([list(s.values()) for s in optimizer.state.values()])
        optimizer.found_inf = torch.tensor(float(not is_taken))
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step()
        if is_taken:
            other.step()
            assert all(torch.equal(named[n], twin[n]) for n in named)
        else:
            assert all(torch.equal(named[n], before[n]) for n in named)
            after = [list(s.values()) for s in optimizer.state.values()]
            for old, new in zip(kept, after, strict=False):
                assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_a_state_of_schedule_free_that_is_loaded_gives_the_same_weights() -> None:
    named = weights(torch.float32)
    optimizer: Any = ScheduleFreeAdamWConfig().build(named)
    for step in range(3):
        for name, gradient in gradients(step, torch.float32).items():
            named[name].grad = gradient
        optimizer.step()
    again = weights(torch.float32)
    other: Any = ScheduleFreeAdamWConfig().build(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.show(average=False)
    for name in named:
        assert torch.equal(named[name], again[name])
        assert not torch.equal(named[name], optimizer.state[named[name]]["x"])
    other.show(average=True)
    assert torch.equal(again["head.norm.weight"], optimizer.state[named["head.norm.weight"]]["x"])


def test_weights_that_are_loaded_alone_are_where_schedule_free_starts() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer: Any = ScheduleFreeAdamWConfig(lr=0.0).build({"w": weight})
    weight.grad = torch.zeros(3)
    optimizer.step()
    state = optimizer.state[weight]
    state["step"].zero_()
    state["x"].copy_(torch.tensor([5.0, 6.0, 7.0]))
    optimizer.show(average=False)
    assert weight.tolist() == state["z"].tolist() == [5.0, 6.0, 7.0]


def test_moments_of_8_bits_take_a_quarter_of_the_memory_and_steps_are_close_to_adamw_s() -> None:
    pytest.importorskip("torchao")

    def train(config: Optimizer, size: int) -> tuple[torch.Tensor, Any]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, size))
        optimizer = config.build({"blocks.0.up.weight": weight})
        target = torch.linspace(1, -1, size).sin()
        for _ in range(20):
            weight.grad = (weight - target).detach()
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    with (
        mock.patch.object(torch, "compile", lambda function, **_: function),
        mock.patch("toolkit.optim.adamw_8bit.log.info") as said,
    ):
        found, state = train(AdamW8bitConfig(lr=1e-2), 8192)
        small, whole = train(AdamW8bitConfig(lr=1e-2), 2048)
    assert "the first step compiles" in said.call_args.args[0]  # minutes, else in silence
    expected, moments = train(AdamWConfig(lr=1e-2), 8192)
    assert state["exp_avg"].codes.dtype == torch.uint8
    assert state["exp_avg"].scale.numel() == 8192 // 256
    assert 1e-4 < (found - expected).abs().mean() < 5e-3  # of a way of 0.2
    error = state["exp_avg"].dequantize() - moments["exp_avg"]
    assert error.norm() < 0.05 * moments["exp_avg"].norm()
    # Those of less than 4,096 values keep moments of fp32.
    assert whole["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(small, train(AdamWConfig(lr=1e-2), 2048)[0])
