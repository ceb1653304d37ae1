"""Where the time of a run went, and why nothing was trained in between."""

import msgspec
import numpy as np

from toolkit.metrics.history import History, Series
from toolkit.runs.facts import AttemptFacts, RunFacts
from toolkit.wording import count, span

_SHORTEST = 1.0
"""Seconds without training that are worth a line."""
_MOST = 12


class Gap(msgspec.Struct, frozen=True):
    """A time between two steps in which no step was made."""

    after_step: int
    seconds: float
    reason: str


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """None: the metrics do not tell."""

    median: float | None = None
    """Tokens per second of a step."""
    mean: float | None = None
    """Tokens per second of the whole time from the first to the last step."""
    seconds: float | None = None
    """That time."""
    training: float | None = None
    """Share of it that steps took."""
    mfu: float | None = None
    """Median."""
    gaps: list[Gap] = []
    """The longest, in order of steps."""
    by_reason: dict[str, float] = {}
    """Kind of reason -> seconds in all gaps, the short ones too."""


def throughput(facts: RunFacts, history: History) -> Throughput:
    """Times between lines of train.jsonl, less what the steps themselves took."""
    rate = history.train.get("tokens_per_second")
    mfu = history.train.get("mfu")
    found = Throughput(median=_median(rate), mfu=_median(mfu))
    if rate is None:
        return found
    usable = np.isfinite(rate.time) & np.isfinite(rate.value) & (rate.value > 0)
    usable &= rate.tokens >= 0
    line = Series._make(column[usable] for column in rate)
    if len(line.step) < 2:
        return found
    whole = float(line.time[-1] - line.time[0])
    tokens = np.diff(line.tokens)
    idle = np.diff(line.time) - tokens / line.value[1:]
    idle = np.where(np.diff(line.step) == 1, idle, 0.0).clip(min=0.0)
    if whole <= 0:
        return found
    reasons = _Reasons(facts, history, line)
    longest = np.sort(np.argsort(-idle, kind="stable")[:_MOST])
    gaps = [
        Gap(int(line.step[at]), float(idle[at]), reasons.words(int(at)))
        for at in longest
        if idle[at] >= _SHORTEST
    ]
    by_reason: dict[str, float] = {}
    for at in np.flatnonzero(idle > 0):
        kind = reasons.kind(int(at))
        by_reason[kind] = by_reason.get(kind, 0.0) + float(idle[at])
    return msgspec.structs.replace(
        found,
        mean=float(tokens.sum()) / whole,
        seconds=whole,
        training=max(0.0, 1.0 - float(idle.sum()) / whole),
        gaps=gaps,
        by_reason=dict(sorted(by_reason.items(), key=lambda item: -item[1])),
    )


class _Reasons:
    """What happened after a step, by the other files of the run."""

    def __init__(self, facts: RunFacts, history: History, line: Series) -> None:
        self._step = line.step
        self._saved = {saved.step for saved in facts.checkpoints}
        self._ends = _ends(facts.attempts, history.train.get("attempt"))
        self._evaluations: dict[int, float] = {}
        for name, series in history.eval.items():
            if name.endswith("seconds"):
                for step, seconds in zip(series.step.tolist(), series.value.tolist(), strict=True):
                    self._evaluations[step] = self._evaluations.get(step, 0.0) + seconds

    def kind(self, at: int) -> str:
        """In a word or two."""
        step = int(self._step[at])
        if step in self._ends:
            return "interruptions"
        if step in self._evaluations:
            return "evaluations" + (" and checkpoints" if step in self._saved else "")
        return "checkpoints" if step in self._saved else "between steps, not explained"

    def words(self, at: int) -> str:
        """Whole."""
        step, parts = int(self._step[at]), []
        if (attempt := self._ends.get(step)) is not None:
            why = f" ({attempt.reason})" if attempt.reason else ""
            parts.append(f"attempt {attempt.number} ended: {attempt.state}{why}")
            if attempt.done_again:
                again = count(attempt.done_again, "step")
                parts.append(f"{again} after the last kept one done again")
        if step in self._evaluations:
            parts.append(f"evaluation, {span(self._evaluations[step])}")
        if step in self._saved:
            parts.append("checkpoint")
        return ", ".join(parts) or "not explained by what was recorded"


def _ends(attempts: list[AttemptFacts], series: Series | None) -> dict[int, AttemptFacts]:
    """The last step that is kept of an attempt -> that attempt; the newest goes on, or has ended
    the run."""
    if series is None:
        return {a.last_step: a for a in attempts[:-1] if a.last_step is not None}
    known = {attempt.number: attempt for attempt in attempts}
    last = np.flatnonzero(np.diff(series.value))
    return {
        int(series.step[at]): known[int(series.value[at])]
        for at in last.tolist()
        if series.value[at] in known
    }


def _median(series: Series | None) -> float | None:
    known = series.value[np.isfinite(series.value)] if series is not None else ()
    return float(np.median(known)) if len(known) else None
