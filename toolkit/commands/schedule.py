"""What a config schedules, over the whole run: `toolkit schedule`. Nothing is trained or written.

Values are computed by the functions that training calls, at evenly spaced steps and on both sides
of every change.
"""

import bisect
from pathlib import Path

import msgspec

from toolkit.commands.chart import png, text
from toolkit.data.corpus_info import check_batch_schedules, read_corpus
from toolkit.data.order.plan import Batches
from toolkit.errors import ConfigError, ErrorList
from toolkit.experiment.checks import batches_of
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment
from toolkit.experiment.schedules import (
    Scheduled,
    check_schedule_lengths,
    length_in,
    schedule_notices,
    scheduled_settings,
)
from toolkit.storage.atomic import write_atomic
from toolkit.train.scheduled import check_schedules, factor_at
from toolkit.train.timeline import Progress, Timeline
from toolkit.wording import count

_POINTS = 400
"""Evenly spaced steps, besides the changes."""


class Curve(msgspec.Struct, frozen=True):
    """One setting over the run."""

    name: str
    values: list[float]
    """At each of `SchedulePlot.steps`."""


class SchedulePlot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a config schedules."""

    total_steps: int
    total_tokens: int
    steps: list[int]
    """Steps, counted from 1 as in train.jsonl."""
    tokens: list[int]
    """Tokens seen before each of them."""
    curves: list[Curve]
    """The learning rate, `train_module.schedules`, batch size and row length."""
    notices: list[str]

    def text(self, width: int = 72) -> str:
        """The curves as plain text, one below the other; constant ones as a number."""
        axis = (f"step {self.steps[0]:,}", f"{count(self.total_steps, 'step')}")
        parts = [
            text(curve.name, self.steps, curve.values, axis=axis, width=width)
            for curve in self.curves
        ]
        total = f"{count(self.total_steps, 'step')}, {count(self.total_tokens, 'token')}"
        return "\n\n".join([total, *parts, *(f"note: {line}" for line in self.notices)])

    def write_png(self, path: Path, *, config: str) -> None:
        """The curves of `config` as an image. Raises ConfigError: Pillow is not installed."""
        title = f"{config}: {count(self.total_steps, 'step')}, {count(self.total_tokens, 'token')}"
        curves = {curve.name: curve.values for curve in self.curves}
        write_atomic(path, png(self.steps, curves, axis="step", title=title))


def plot_schedule(loaded: LoadedExperiment) -> SchedulePlot:
    """Raises ConfigError: a schedule that does not fit the run, or a length in epochs of data that
    is not prepared."""
    config = loaded.config
    batches = batches_of(config, read_corpus(config.data))
    found = ErrorList()
    found.ask(check_batch_schedules, config.data)
    found.ask(check_schedules, config.train_module)
    found.ask(check_schedule_lengths, config, batches, loaded.origins)
    found.raise_any()
    total = Timeline.of(config.trainer, batches.steps_of).total_steps
    settings = scheduled_settings(config)
    steps = _steps(config, settings, batches, total)
    curves = [Curve(s.name, [_value(s, step, total, batches) for step in steps]) for s in settings]
    sizes = [batches.sizes(step) for step in steps]
    curves += [Curve(name, [float(size[name]) for size in sizes]) for name in sizes[0]]
    return SchedulePlot(
        total_steps=total,
        total_tokens=batches.tokens_done(total),
        steps=[step + 1 for step in steps],
        tokens=[batches.tokens_done(step) for step in steps],
        curves=curves,
        notices=list(schedule_notices(config, batches, loaded.origins)),
    )


def _value(setting: Scheduled, step: int, total: int, batches: Batches) -> float:
    progress = Progress.at(step, total, batches)
    return setting.peak * factor_at(setting.schedule, progress, setting.peak, setting.name)


def _steps(
    config: ExperimentConfig, settings: list[Scheduled], batches: Batches, total: int
) -> list[int]:
    """Steps done before those that are looked at, ascending."""
    places = {round(n * (total - 1) / _POINTS) for n in range(_POINTS + 1)}
    changes = [segment.first_batch for segment in batches.plan.segments]
    for setting in settings:
        try:
            length = length_in(setting.schedule, total, batches)
        except ConfigError as error:
            raise ConfigError(str(error), key=f"{setting.key}.units") from None
        changes += [
            _step_at(joint, setting, batches, total) for joint in setting.schedule.joints(length)
        ]
    around = {change + offset for change in changes for offset in (-1, 0, 1)}
    return sorted(step for step in places | around if 0 <= step < total)


def _step_at(joint: float, setting: Scheduled, batches: Batches, total: int) -> int:
    """The first step that begins at or after `joint`, in the units of the schedule."""
    units = setting.schedule.units
    if units == "steps":
        return int(joint)
    done = batches.tokens_done if units == "tokens" else batches.epochs_done
    return bisect.bisect_left(range(total), joint, key=done)
