"""Learning-rate schedules are pure functions of step or tokens."""

import math

import pytest

from toolkit.optim.schedules import ConstantConfig, CosineConfig, LinearConfig


def test_cosine_warms_up_peaks_and_ends_at_alpha_f() -> None:
    schedule = CosineConfig(warmup=10, alpha_f=0.1)
    assert schedule.factor(0, 110) == pytest.approx(0.1)
    assert schedule.factor(9, 110) == 1.0
    assert schedule.factor(10, 110) == 1.0
    assert schedule.factor(60, 110) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.factor(35, 110) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert schedule.factor(110, 110) == pytest.approx(0.1)
    assert schedule.factor(500, 110) == pytest.approx(0.1)


def test_linear_goes_straight_down() -> None:
    schedule = LinearConfig(warmup=0, alpha_f=0.0)
    assert [schedule.factor(s, 10) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_constant_stays_after_warmup() -> None:
    schedule = ConstantConfig(warmup=4)
    assert [schedule.factor(s, 9) for s in (0, 1, 3, 8)] == [0.25, 0.5, 1.0, 1.0]


def test_tokens_and_steps_give_the_same_curve() -> None:
    by_step = CosineConfig(warmup=10)
    by_token = CosineConfig(warmup=10 * 512, units="tokens")
    for step in range(100):
        rate = by_token.factor(step * 512, 100 * 512, step_size=512)
        assert rate == pytest.approx(by_step.factor(step, 100))
