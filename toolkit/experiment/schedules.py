"""Schedules against the length of the run: what never starts or ends is refused, or noticed."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from toolkit.config import DEFAULT_ORIGIN
from toolkit.data.order.plan import Batches
from toolkit.errors import ConfigError, ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.optim.schedule import Amount, Schedule, Span
from toolkit.train.scheduled import KEY, LR, Z_LOSS, bound_of, largest_of, settings_of
from toolkit.train.timeline import Timeline

SCHEDULER = "train_module.scheduler"
_POINTS = 200
"""At which a bounded setting is looked at."""


class Scheduled(NamedTuple):
    """A setting and the schedule that it follows."""

    name: str
    schedule: Schedule
    peak: float
    """The setting's own value."""
    key: str


def scheduled_settings(config: ExperimentConfig) -> list[Scheduled]:
    """The learning rate, and what `train_module.schedules` names."""
    module = config.train_module
    peaks = {**settings_of(module.optim), Z_LOSS: module.z_loss_multiplier or 0.0}
    return [
        Scheduled(LR, module.scheduler, module.optim.lr, SCHEDULER),
        *(
            Scheduled(name, schedule, peaks.get(name, 0.0), f"{KEY}.{name}")
            for name, schedule in module.schedules.items()
        ),
    ]


def length_in(schedule: Schedule, total_steps: int, batches: Batches) -> Amount:
    """The length of the run in the units of `schedule`. Raises ConfigError: epochs of data that
    does not say how long one is."""
    if schedule.units == "steps":
        return total_steps
    if schedule.units == "tokens":
        return batches.tokens_done(total_steps)
    try:
        batches.steps_of(1, "epochs")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return batches.epochs_done(total_steps)


def check_schedule_lengths(
    config: ExperimentConfig, batches: Batches, origins: Mapping[str, str]
) -> None:
    """Check that every schedule fits the run. A warm-up that was not written for this length may be
    longer, so that a config can be tried for some steps. Raises ConfigError.

    A length in epochs of data that is not prepared yet is looked at later.
    """
    found = ErrorList()
    for setting, span in _spans(config, batches, origins, found):
        found.ask(setting.schedule.check_length, span)
        if bound_of(setting.name) is not None:
            optim = config.train_module.optim
            found.ask(_check_bound, setting, span, largest_of(optim, setting.name))
    found.raise_any()


def schedule_notices(
    config: ExperimentConfig, batches: Batches, origins: Mapping[str, str]
) -> Iterator[str]:
    """What of the schedules does less than it says."""
    for setting, span in _spans(config, batches, origins, ErrorList()):
        yield from setting.schedule.notices(span)


def _spans(
    config: ExperimentConfig, batches: Batches, origins: Mapping[str, str], found: ErrorList
) -> Iterator[tuple[Scheduled, Span]]:
    try:
        total_steps = Timeline.of(config.trainer, batches.steps_of).total_steps
    except ConfigError:
        return
    for setting in scheduled_settings(config):
        schedule, key = setting.schedule, setting.key
        try:
            total = length_in(schedule, total_steps, batches)
        except ConfigError as error:
            if config.dataset.custom is not None:
                found.add(ConfigError(str(error), key=f"{key}.units"))
            continue
        refuses = key != SCHEDULER or _is_asked_for(origins)
        yield setting, Span(total, setting.peak, key, refuses_warmup=refuses)


def _is_asked_for(origins: Mapping[str, str]) -> bool:
    """Whether the user wrote the warm-up for this length: it is no recipe's, nor one of a file
    whose run a flag makes shorter."""
    warmup = origins.get(f"{SCHEDULER}.warmup", DEFAULT_ORIGIN)
    is_shortened = origins.get("trainer.max_duration.value", "").startswith("--")
    if warmup.startswith("--"):
        return True
    return not warmup.startswith((DEFAULT_ORIGIN, "recipe ")) and not is_shortened


def _check_bound(setting: Scheduled, span: Span, largest: float) -> None:
    """`largest`: what the schedule multiplies in the group that has most."""
    bound = bound_of(setting.name)
    assert bound is not None
    joints = [joint for joint in setting.schedule.joints(span.total) if joint < span.total]
    points = [*joints, *(span.total * n / _POINTS for n in range(_POINTS))]
    value, at = max(
        (largest * setting.schedule.factor(point, span.total, peak=setting.peak), point)
        for point in points
    )
    if value >= bound:
        raise ConfigError(
            f"makes it {value:g} after {setting.schedule.said(round(at))}, and it must stay below "
            f"{bound:g}; use smaller fractions",
            key=setting.key,
        )
