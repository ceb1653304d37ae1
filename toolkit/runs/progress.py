"""How far a run came, by its files of metrics: the newest steps and all evaluations."""

import contextlib
import math
import statistics
from pathlib import Path

import msgspec

from toolkit.errors import RunError
from toolkit.metrics.lines import last_records, read_records
from toolkit.runs.files import RUN_FILES

_SPEED_STEPS = 100
"""`tokens_per_second` is the median of as many newest steps: a pause does not spoil it."""
_USUAL = "val"
"""The evaluation whose loss counts where a run has several."""


class _Step(msgspec.Struct):
    step: int
    tokens: float | None = None
    time: float | None = None
    loss: float | str | None = None
    tokens_per_second: float | str | None = None


class _Evaluation(msgspec.Struct):
    step: int
    name: str = ""
    loss: float | str | None = None


class Progress(msgspec.Struct, kw_only=True):
    """None: not recorded (yet)."""

    step: int | None = None
    tokens: int | None = None
    time: float | None = None
    """Of the newest step, Unix seconds."""
    loss: float | None = None
    """Training loss of the newest step."""
    tokens_per_second: float | None = None
    """Median of the newest 100 steps."""
    val_name: str | None = None
    """The evaluation that the next four are of: "val", else the first that has a loss."""
    val_loss: float | None = None
    val_step: int | None = None
    best_val_loss: float | None = None
    best_val_step: int | None = None


def read_progress(folder: Path) -> Progress:
    """What the metrics in a run folder tell; files that cannot be read tell nothing."""
    progress = Progress()
    steps = last_records(folder / RUN_FILES.train_metrics, _Step, _SPEED_STEPS)
    if steps:
        newest = steps[0]
        progress.step, progress.time = newest.step, newest.time
        progress.loss = as_float(newest.loss)
        if newest.tokens is not None and math.isfinite(newest.tokens):
            progress.tokens = int(newest.tokens)
        rates = [rate for s in steps if (rate := as_float(s.tokens_per_second)) is not None]
        progress.tokens_per_second = statistics.median(rates) if rates else None
    losses: dict[str, dict[int, float]] = {}
    with contextlib.suppress(RunError):
        for line in read_records(folder / RUN_FILES.eval_metrics, _Evaluation):
            if (loss := as_float(line.loss)) is not None:
                same = losses.setdefault(line.name, {})
                if same and line.step <= next(reversed(same)):  # begun again at an earlier step
                    same = losses[line.name] = {s: v for s, v in same.items() if s < line.step}
                same[line.step] = loss
    if losses:
        name = _USUAL if _USUAL in losses else next(iter(losses))
        values = losses[name]
        progress.val_name = name
        progress.val_step, progress.val_loss = next(reversed(values.items()))
        finite = {step: loss for step, loss in values.items() if math.isfinite(loss)}
        if finite:
            progress.best_val_step = min(finite, key=finite.__getitem__)
            progress.best_val_loss = finite[progress.best_val_step]
    return progress


def as_float(value: float | str | None) -> float | None:
    """A number of a file of metrics, where nan and infinities are text."""
    with contextlib.suppress(ValueError):
        return None if value is None else float(value)
    return None
