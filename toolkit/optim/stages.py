"""Schedules in stages: other schedules one after the other, and lines one after the other."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.errors import ConfigError
from toolkit.optim.curves import CosineConfig, CurveConfig
from toolkit.optim.schedule import Amount, Schedule, Shape, Span, default_of, remaining


class StageConfig(Config, kw_only=True):
    """A stage of a sequential schedule."""

    scheduler: CurveConfig = CosineConfig()
    """The schedule of the stage. Its lengths count from where the stage begins, and the stage is
    its run. Its warm-up starts from the value that the stage before ends at."""
    until: Amount | None = None
    """Where the stage ends, in `units` from the beginning of the run; null: with the run, or as
    `until_fraction` says."""
    until_fraction: float | None = None
    """The same as a fraction of the run."""
    peak: float | None = None
    """Multiple of the peak that the stage's schedule multiplies; null: where the stage before ends
    (1 in the first)."""

    def __post_init__(self) -> None:
        check_positive(self, "until", "until_fraction", "peak")
        if self.until is not None and self.until_fraction is not None:
            raise ValueError("until_fraction: until is given too; set one of them to null")
        inner = self.scheduler
        if inner.decay_from is not None or inner.t_max is not None:
            raise ValueError(
                "scheduler: decay_from and t_max belong to the whole schedule; a stage ends at its "
                "until, and decay is the length of the decay at its end"
            )


class _Placed(NamedTuple):
    """A stage on the axis of the run."""

    stage: StageConfig
    begin: Amount
    end: Amount
    peak: float
    start: float
    """Where its warm-up starts, as a multiple of the run's peak."""


class _Stages(Schedule, kw_only=True):
    def _before_decay(
        self, current: Amount, total: Amount, step_size: Amount, peak: float, start: float
    ) -> float:
        return self.curve(current, 0, total, peak, step_size)

    def curve(
        self, current: Amount, warmup: Amount, total: Amount, peak: float, step_size: Amount = 1
    ) -> float:
        raise NotImplementedError


class SequentialConfig(_Stages, kw_only=True, tag_field="type", tag="sequential"):
    """Other schedules one after the other, each until a point of the run."""

    stages: tuple[StageConfig, ...] = (StageConfig(),)
    """The stages, in the order of `until`; only the last one may leave it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lines = _no_warmup_of_its_own(self)
        if not self.stages:
            lines.append("stages must not be empty")
        for number, stage in enumerate(self.stages):
            if stage.scheduler.units not in ("steps", self.units):
                lines.append(
                    f"stages.{number}.scheduler.units is {stage.scheduler.units}; all stages count "
                    f"{self.units}, as the schedule around them"
                )
            is_open = stage.until is None and stage.until_fraction is None
            if is_open and number < len(self.stages) - 1:
                lines.append(f"stages.{number} has no until, and stages.{number + 1} follows it")
        for name in ("until", "until_fraction"):
            given = [(n, v) for n, s in enumerate(self.stages) if (v := getattr(s, name))]
            for (before, least), (number, value) in itertools.pairwise(given):
                if value <= least:
                    lines.append(
                        f"stages.{number}.{name} is {value:,}, and stages.{before} ends at "
                        f"{least:,} already; stages follow each other: use more than {least:,}"
                    )
        if lines:
            raise ValueError("\n".join(lines))

    def placed(self, total: Amount, peak: float) -> list[_Placed]:
        """The stages with their begin and end, and the values they start from."""
        found: list[_Placed] = []
        begin: Amount = 0
        value: float = 1.0
        start = self.warmup_min_lr / peak if self.warmup_min_lr and peak else None
        for stage in self.stages:
            end = stage.until
            if end is None and stage.until_fraction is not None:
                end = stage.until_fraction * total
                end = end if self.units == "epochs" else round(end)
            end = max(begin, total) if end is None else end
            top = value if stage.peak is None else stage.peak
            inner = stage.scheduler
            if not found:
                floor = inner.warmup_min_lr / peak if peak else 0.0
                start = floor if start is None else start
            place = _Placed(stage, begin, end, top, 0.0 if start is None else start)
            found.append(place)
            value = start = _value(place, end, 1, peak)
            begin = end
        return found

    def curve(
        self, current: Amount, warmup: Amount, total: Amount, peak: float, step_size: Amount = 1
    ) -> float:
        places = self.placed(total, peak)
        place = next((p for p in places if current < p.end), places[-1])
        return _value(place, current, step_size, peak)

    def joints(self, total: Amount) -> list[Amount]:
        found = super().joints(total)
        for stage, begin, end, *_ in self.placed(self.t_max or total, 1.0):
            found += [begin + place for place in stage.scheduler.joints(end - begin)] + [end]
        return found

    def check(self) -> None:
        for stage in self.stages:
            stage.scheduler.check()

    def _problems(self, span: Span) -> Iterator[ConfigError]:
        yield from super()._problems(span)
        total = self.t_max or span.total
        for number, (stage, begin, end, top, _) in enumerate(self.placed(total, span.peak)):
            key = f"{span.key}.stages.{number}"
            if begin >= span.total:
                yield ConfigError(
                    f"begins after {self.said(begin)}, and the run ({span.length_key}) ends after "
                    f"{self.said(span.total)}: it never starts; let the stage before end earlier, "
                    "or take this one out",
                    key=key,
                )
                continue
            if end <= begin:
                yield ConfigError(
                    f"ends after {self.said(end)}, and the stage before after {self.said(begin)}: "
                    f"stages follow each other; use more than {begin:,}",
                    key=f"{key}.until",
                )
                continue
            inner = stage.scheduler.replace(units=self.units)
            peak, limit = top * span.peak, f"{key}.until"
            if stage.until is None and stage.until_fraction is None:
                limit = span.length_key
            yield from inner._problems(Span(end - begin, peak, f"{key}.scheduler", limit))


def _value(place: _Placed, current: Amount, step_size: Amount, peak: float) -> float:
    """Multiple of the run's peak at `current`, a point of the run."""
    stage, begin, end, top, start = place
    length = end - begin
    if not top or length <= 0:
        return top
    return top * stage.scheduler.factor(
        current - begin, length, step_size=step_size, peak=top * peak, start=start / top
    )


class ComposableStageConfig(Config, kw_only=True):
    """A line from one value to another. Values are rates, or fractions of the peak."""

    duration: Amount | None = None
    """Length, in `units`; null: `duration_fraction`."""
    duration_fraction: float | None = None
    """Length as a fraction of the run."""
    shape: Shape = "linear"
    """A straight line, half a cosine, or 1 - sqrt."""
    start_lr: float | None = None
    """Value to begin with; null, and `start_lr_fraction` too: where the stage before ends (the peak
    in the first)."""
    start_lr_fraction: float | None = None
    """The same as a fraction of the peak."""
    end_lr: float | None = None
    """Value to end at; this or `end_lr_fraction` is needed."""
    end_lr_fraction: float | None = None
    """The same as a fraction of the peak."""

    def __post_init__(self) -> None:
        check_positive(self, "duration", "duration_fraction")
        check_not_negative(self, "start_lr", "start_lr_fraction", "end_lr", "end_lr_fraction")
        for name, other, is_needed in (
            ("duration", "duration_fraction", True),
            ("start_lr", "start_lr_fraction", False),
            ("end_lr", "end_lr_fraction", True),
        ):
            given = sum(getattr(self, n) is not None for n in (name, other))
            if given == 2 or (is_needed and not given):
                few = "one" if is_needed else "at most one"
                raise ValueError(f"{name}: give {few} of {name} and {other}")


class ComposableConfig(_Stages, kw_only=True, tag_field="type", tag="composable"):
    """Lines one after the other; after the last one its end is kept."""

    stages: tuple[ComposableStageConfig, ...] = (
        ComposableStageConfig(duration_fraction=0.02, start_lr_fraction=0.0, end_lr_fraction=1.0),
        ComposableStageConfig(duration_fraction=0.78, end_lr_fraction=1.0),
        ComposableStageConfig(duration_fraction=0.2, end_lr_fraction=0.0),
    )
    """The lines; default: a warm-up, the peak, a linear decay to zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lines = _no_warmup_of_its_own(self)
        if not self.stages:
            lines.append("stages must not be empty")
        if lines:
            raise ValueError("\n".join(lines))

    def ends(self, total: Amount) -> list[Amount]:
        """Where each stage ends, in `units`."""
        lengths = [
            stage.duration or (stage.duration_fraction or 0) * total for stage in self.stages
        ]
        ends = list(itertools.accumulate(lengths))
        return ends if self.units == "epochs" else [round(end) for end in ends]

    def curve(
        self, current: Amount, warmup: Amount, total: Amount, peak: float, step_size: Amount = 1
    ) -> float:
        begin: Amount = 0
        value: float = 1.0
        for stage, end in zip(self.stages, self.ends(total), strict=True):
            first = _multiple(stage.start_lr, stage.start_lr_fraction, peak)
            first = value if first is None else first
            last = _multiple(stage.end_lr, stage.end_lr_fraction, peak)
            value = first if last is None else last
            if current < end:
                # As in a warm-up, the first step of a rise already moves.
                done = current + step_size if value > first else current
                left = remaining(stage.shape, (done - begin) / (end - begin))
                return value + (first - value) * left
            begin = end
        return value

    def joints(self, total: Amount) -> list[Amount]:
        return [*super().joints(total), *self.ends(self.t_max or total)]

    def _problems(self, span: Span) -> Iterator[ConfigError]:
        yield from super()._problems(span)
        begin: Amount = 0
        last = len(self.stages) - 1
        for number, end in enumerate(self.ends(self.t_max or span.total)):
            key = f"{span.key}.stages.{number}"
            if begin >= span.total or (number == last and end > span.total):
                what = "never starts" if begin >= span.total else "never ends"
                yield ConfigError(
                    f"lasts from {begin:,} to {self.said(end)}, and the run ({span.length_key}) "
                    f"ends after {self.said(span.total)}: it {what}; shorten the stages to "
                    f"{self.said(span.total)} in all",
                    key=f"{key}.duration",
                )
                return
            begin = end
        end_value = self.stages[-1].end_lr or self.stages[-1].end_lr_fraction
        if begin < span.total and not end_value and self.decay_from is None:
            yield ConfigError(
                f"the stages end after {self.said(begin)}, and the run ({span.length_key}) after "
                f"{self.said(span.total)}: the rest would train at 0; add a stage of "
                f"{self.said(span.total - begin)}, or end the run there",
                key=f"{span.key}.stages",
            )


def _multiple(value: float | None, fraction: float | None, peak: float) -> float | None:
    if value is None:
        return fraction
    return value / peak if peak else 0.0


def _no_warmup_of_its_own(config: Schedule) -> list[str]:
    given: Sequence[Any] = (config.warmup, config.warmup_fraction)
    if not any(given):
        return []
    own = default_of(type(config), "stages")[0]
    how = "as a stage" if isinstance(own, ComposableStageConfig) else "into the first stage"
    return [f"warmup: a schedule of stages has none of its own; write it {how}"]
