"""Schedules are pure functions of step, tokens or epochs, with the values of their formulas."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.config import convert
from toolkit.errors import ConfigError
from toolkit.optim.schedules import Schedule, SchedulerConfig, Span

TYPES = (
    "constant", "linear", "cosine", "half_cosine", "cosine_linear", "inv_sqrt", "wsd", "wsds",
    "power", "exponential", "sequential", "composable",
)  # fmt: skip
TOKENS = 512
"""Of a step, where units are compared."""


def schedule(type: str, **given: Any) -> Schedule:
    made: Schedule = convert({"type": type, **given}, SchedulerConfig)  # type: ignore[arg-type]
    return made


def half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# type, settings -> {steps done: factor}, of a run of 1000 steps.
TABLE: list[tuple[str, dict[str, Any], dict[int, float]]] = [
    ("constant", {}, {0: 1, 500: 1, 999: 1}),
    ("constant", {"warmup": 4}, {0: 0.25, 1: 0.5, 3: 1, 8: 1}),
    ("constant", {"warmup_fraction": 0.01}, {0: 0.1, 9: 1, 10: 1}),
    ("constant", {"warmup": 4, "warmup_min_lr": 0.2}, {0: 0.4, 1: 0.6, 3: 1}),
    ("linear", {}, {0: 0.01, 99: 1, 100: 1, 550: 0.5, 1000: 0, 2000: 0}),
    ("linear", {"warmup": 0, "alpha_f": 0.2}, {0: 1, 500: 0.6, 1000: 0.2}),
    ("linear", {"warmup": 0, "t_max": 500}, {250: 0.5, 500: 0, 900: 0}),
    ("cosine", {}, {0: 0.01, 99: 1, 100: 1, 550: 0.55, 1000: 0.1}),
    ("cosine", {"warmup": 10, "t_max": 110},
     {0: 0.1, 60: 0.55, 35: 0.1 + 0.9 * half_cosine(0.25), 110: 0.1, 500: 0.1}),
    ("half_cosine", {}, {0: 0.0055, 99: 0.55, 100: 0.55, 1000: 0.1,
                         550: 0.1 + 0.9 * half_cosine(0.75)}),
    ("cosine_linear", {}, {550: 0.55, 900: 0.1 + 0.9 * half_cosine(800 / 900),
                           950: (0.1 + 0.9 * half_cosine(800 / 900)) / 2, 1000: 0}),
    ("inv_sqrt", {}, {0: 0.01, 100: 1, 400: 0.1 + 0.9 * 0.5, 900: 0.1 + 0.9 / 3}),
    ("wsd", {}, {0: 0.01, 100: 1, 899: 1, 900: 1, 950: 0.5, 999: 0.01, 1000: 0, 1500: 0}),
    ("wsd", {"decay": 200, "decay_min_lr": 0.1}, {799: 1, 800: 1, 900: 0.55, 1000: 0.1}),
    ("wsd", {"decay_fraction": 0.4, "decay_shape": "sqrt"}, {600: 1, 700: 0.5, 1000: 0}),
    ("wsd", {"decay_fraction": 0.4, "decay_shape": "cosine"}, {600: 1, 700: half_cosine(0.25)}),
    ("wsds", {}, {0: 0.02, 50: 1, 225: 1, 249: 0.04, 250: 1, 499: 0.04, 500: 1, 949: 1,
                  975: 0.5, 1000: 0}),
    ("wsds", {"period_lengths": [300, 700], "decay": 100, "period_lr_multipliers": [1.0, 0.5],
              "decay_min_lr": 0.1}, {200: 1, 250: 0.55, 300: 0.5, 899: 0.5, 950: 0.3, 1000: 0.1}),
    ("power", {}, {0: 0.01, 100: 1, 200: 2**-0.51, 400: 4**-0.51, 900: 9**-0.51,
                   950: 9**-0.51 / 2, 1000: 0}),
    ("exponential", {"lr_min": 1e-4}, {0: 1e-4, 250: 1e-3, 500: 1e-2, 1000: 1}),
    ("exponential", {"alpha_f": 0.01}, {0: 1, 500: 0.1, 1000: 0.01}),
    ("sequential", {"stages": [
        {"scheduler": {"type": "linear", "warmup": 0, "alpha_f": 0.5}, "until": 200},
        {"scheduler": {"type": "constant"}, "until_fraction": 0.5},
        {"scheduler": {"type": "linear", "warmup": 100}, "peak": 1.0},
     ]}, {0: 1, 100: 0.75, 200: 0.5, 499: 0.5, 549: 0.75, 599: 1, 600: 1, 800: 0.5, 1000: 0}),
    ("composable", {}, {0: 0.05, 19: 1, 20: 1, 799: 1, 900: 0.5, 1000: 0}),
    ("composable", {"stages": [
        {"duration": 100, "start_lr_fraction": 0, "end_lr": 0.5},
        {"duration": 100, "end_lr_fraction": 0.1, "shape": "cosine"},
     ]}, {49: 0.25, 99: 0.5, 150: 0.3, 200: 0.1, 999: 0.1}),
    ("cosine", {"decay_from": 550, "decay": 100}, {550: 0.55, 600: 0.275, 650: 0, 999: 0}),
    ("constant", {"decay_from": 600}, {599: 1, 800: 0.5, 1000: 0}),
    ("wsds", {"decay_from": 400, "decay": 50}, {399: 1, 425: 0.5, 500: 0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given_", "values"), TABLE)
def test_values(kind: str, given_: dict[str, Any], values: dict[int, float]) -> None:
    made = schedule(kind, **given_)
    found = {step: made.factor(step, 1000) for step in values}
    assert found == pytest.approx(values, abs=1e-12)


IN_UNITS = ("warmup", "decay", "decay_from", "t_max", "until", "duration", "period_lengths")


def scaled(value: Any, factor: float, units: str, name: str = "") -> Any:
    """Lengths of a config in other units."""
    if isinstance(value, dict):
        found = {key: scaled(inner, factor, units, key) for key, inner in value.items()}
        return found | {"units": units} if name == "scheduler" else found
    if isinstance(value, list):
        return [scaled(item, factor, units, name) for item in value]
    return value * factor if name in IN_UNITS else value


@pytest.mark.parametrize(("kind", "given_", "values"), TABLE)
def test_tokens_and_epochs_give_the_curve_of_steps(
    kind: str, given_: dict[str, Any], values: dict[int, float]
) -> None:
    by_step = schedule(kind, **given_)
    lengths = {"warmup": by_step.warmup} if by_step.warmup and not by_step.warmup_fraction else {}
    for units, one in (("tokens", TOKENS), ("epochs", 1 / 64)):
        other = schedule(kind, **scaled({**lengths, **given_}, one, units), units=units)
        for step in values:
            there = other.factor(step * one, 1000 * one, step_size=one)
            assert there == pytest.approx(by_step.factor(step, 1000), abs=1e-9), (units, step)


def defaults_of(kind: str, **given: Any) -> list[float]:
    return [schedule(kind, **given).factor(step, 400, peak=3e-4) for step in range(401)]


@pytest.mark.parametrize("kind", TYPES)
def test_the_type_alone_stays_within_the_peak_and_has_no_jumps(kind: str) -> None:
    values = defaults_of(kind)
    assert all(0.0 <= value <= 1.0 for value in values)
    assert max(values) > 0.5
    rises = [b - a for a, b in itertools.pairwise(values)]
    largest = max(abs(rise) for rise in rises)
    if kind == "wsds":  # goes on at the peak after each decay
        assert sorted(rises)[-2:] == pytest.approx([0.9, 0.9])
    else:
        assert largest < 0.13


@pytest.mark.parametrize("kind", TYPES)
@settings(deadline=None, max_examples=25)
@given(step=st.integers(0, 400), decay_from=st.integers(1, 399), length=st.integers(1, 200))
def test_a_late_decay_leaves_what_was_before_and_goes_down_from_there(
    kind: str, step: int, decay_from: int, length: int
) -> None:
    plain = schedule(kind)
    late = schedule(kind, decay_from=decay_from, decay=length, decay_min_lr=1e-5)
    found = late.factor(step, 400, peak=1.0)
    if step < decay_from:
        without_its_own = schedule(kind, decay_fraction=None) if plain.decay_fraction else plain
        if kind != "wsds":
            assert found == without_its_own.factor(step, 400, peak=1.0)
    elif step >= decay_from + length:
        assert found == 1e-5
    else:
        top = late.factor(decay_from, 400, peak=1.0)
        assert min(top, 1e-5) <= found <= max(top, 1e-5)
    assert found == convert(late.to_dict(), SchedulerConfig).factor(step, 400)  # type: ignore[arg-type]


def test_the_last_step_of_a_decay_still_trains() -> None:
    for kind in ("wsd", "cosine_linear", "power", "composable"):
        assert schedule(kind).factor(999, 1000) > 0


def test_floors_are_rates_and_a_group_without_rate_has_none() -> None:
    made = schedule("wsd", warmup=10, warmup_min_lr=1e-5, decay_min_lr=1e-6)
    assert 1e-3 * made.factor(0, 100, peak=1e-3) == pytest.approx(1e-5 + 99e-5 / 10)
    assert 1e-3 * made.factor(100, 100, peak=1e-3) == pytest.approx(1e-6)
    assert made.factor(100, 100, peak=0.0) == 0.0


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"type": "wsdd"}, "'wsdd' is not one of .*; did you mean 'wsd'"),
        ({"type": "wsd", "warmup": 5, "warmup_fraction": 0.1}, "warmup_fraction: warmup is given"),
        ({"type": "wsd", "decay": 5, "decay_fraction": 0.2}, "decay_fraction: decay is given too"),
        ({"type": "wsd", "decay_fraction": 1.2}, "decay_fraction must lie between 0 and 1: 1.2"),
        ({"type": "linear", "warmup": 2.5}, "warmup must be a whole number of steps: 2.5"),
        ({"type": "cosine", "alpha_f": 2}, "alpha_f must be a fraction of the peak, 0 to 1: 2"),
        ({"type": "inv_sqrt", "warmup": 0}, "warmup must be greater than 0: the curve is told"),
        ({"type": "power", "b": 0.5}, "b must be less than 0"),
        ({"type": "exponential", "lr_min": 0}, "lr_min must be greater than 0"),
        ({"type": "wsds", "period_fractions": [0.5, 0.4]}, "period_fractions must add up to 1"),
        ({"type": "wsds", "period_lr_multipliers": [1.0]}, "give one for each of the 3 periods"),
        ({"type": "sequential", "warmup": 5}, "a schedule of stages has none of its own"),
        ({"type": "sequential", "stages": [{"until": 9}, {"until": 5}]},
         "stages.1.until is 5, and stages.0 ends at 9 already; .* use more than 9"),
        ({"type": "sequential", "stages": [{}, {"until": 5}]}, "stages.0 has no until"),
        ({"type": "sequential", "stages": [{"scheduler": {"type": "wsd", "decay_from": 3}}]},
         "decay_from and t_max belong to the whole schedule"),
        ({"type": "composable", "stages": [{"duration": 5}]}, "give one of end_lr and"),
    ],
)  # fmt: skip
def test_settings_that_make_no_schedule_are_one_line(given_: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        convert(given_, SchedulerConfig)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"type": "constant", "warmup": 300},
         "s.warmup: 300 steps, and the whole run .* is 200 steps: it never gets beyond the "
         "warm-up; use 200 or less"),
        ({"type": "wsd", "warmup": 150, "decay": 100},
         "s.decay: the decay takes 100 steps, and 50 steps of the run .*; use 50 or less"),
        ({"type": "wsd", "decay": 500},
         "s.decay: the decay takes 500 steps, and 100 steps of the run .*; use 100 or less"),
        ({"type": "cosine", "warmup": 300, "decay": 500}, "s.warmup: 300 steps"),
        ({"type": "wsd", "t_max": 600}, "s.t_max: is 600 steps, .*: the decay never starts; use"),
        ({"type": "sequential",
          "stages": [{"until": 20, "scheduler": {"type": "constant", "decay": 50}}, {}]},
         "s.stages.0.scheduler.decay: the decay takes 50 steps, and 20 steps .* use 20 or less"),
        ({"type": "composable", "stages": [{"duration": 100, "end_lr": 0}]},
         "s.stages: the stages end after 100 steps, .* would train at 0; add a stage of 100"),
        ({"type": "wsd", "warmup": 100, "decay_fraction": 0.75}, "s.decay_fraction: .* use 0.5 or"),
        ({"type": "cosine", "decay_from": 250},
         "s.decay_from: the run .* ends after 200 steps, so this decay never starts; use less than "
         "200"),
        ({"type": "cosine", "decay_from": 150, "decay": 80},
         "s.decay: from 150 on the decay takes 80 steps, and the run .* ends after 200 steps: it "
         "never ends; use a decay of 50 or less, or set trainer.max_duration to 230 steps"),
        ({"type": "constant", "warmup_min_lr": 0.5}, "s.warmup_min_lr: 0.5 is not below the peak"),
        ({"type": "wsds", "period_lengths": [50, 100]},
         "s.period_lengths: the periods end after 150 steps, .* add a period of 50 steps"),
        ({"type": "wsds", "warmup": 0, "period_lengths": [20, 180], "decay": 30},
         "s.decay: the decay of period 0 .* use 20 steps or less"),
        ({"type": "sequential", "stages": [{"until": 300}, {}]},
         "s.stages.1: begins after 300 steps, .* it never starts"),
        ({"type": "sequential", "stages": [{"until": 150}, {"until_fraction": 0.5}]},
         "s.stages.1.until: ends after 100 steps, and the stage before after 150"),
        ({"type": "sequential",
          "stages": [{"until": 50, "scheduler": {"type": "linear", "warmup": 60}}, {}]},
         "s.stages.0.scheduler.warmup: 60 steps, and the whole run .s.stages.0.until. is 50"),
        ({"type": "composable", "stages": [{"duration": 300, "end_lr": 0}]},
         "s.stages.0.duration: lasts from 0 to 300 steps, .*: it never ends"),
        ({"type": "exponential", "lr_min": 0.2}, "s.lr_min: 0.2 is not below the peak 0.1"),
    ],
)  # fmt: skip
def test_schedules_that_do_not_fit_the_run_say_what_works(
    given_: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        convert(given_, SchedulerConfig).check_length(Span(200, 0.1, "s"))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("total", [1, 7, 20, 99])
def test_in_a_run_that_is_too_short_no_factor_is_negative(kind: str, total: int) -> None:
    for given_ in ({}, {"decay": 50}, {"decay": 50, "warmup": 40}):
        if kind in ("sequential", "composable") and "warmup" in given_:
            continue
        made = schedule(kind, **({"decay_fraction": None} if "decay" in given_ else {}), **given_)
        assert all(0 <= made.factor(step, total) <= 1 for step in range(total + 1))


def test_advice_of_epochs_is_what_works() -> None:
    made, total = schedule("constant", units="epochs", warmup=0.05), 0.042826552462526764
    with pytest.raises(ConfigError, match=r"use 0.04282 or less"):
        made.check_length(Span(total, 0.1, "s"))
    schedule("constant", units="epochs", warmup=0.04282).check_length(Span(total, 0.1, "s"))


@pytest.mark.parametrize("kind", TYPES)
def test_the_type_alone_fits_a_run(kind: str) -> None:
    schedule(kind).check_length(Span(400, 3e-4, "s"))


def test_what_does_nothing_is_noticed() -> None:
    [line] = schedule("linear").notices(Span(50, 0.1, "s"))
    assert line.startswith("s.warmup is 100 steps and the whole run (trainer.max_duration) 50")
    [line] = schedule("constant", decay_from=10, decay=20).notices(Span(50, 0.1, "s"))
    assert "the decay is over after 30 steps, and the run goes on at 0 to 50 steps" in line
