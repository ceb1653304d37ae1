"""`toolkit runs watch`: a run while it trains."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from toolkit.commands.runs.curves import overlay
from toolkit.errors import RunError
from toolkit.metrics.history import read_history
from toolkit.runs.facts import RunFacts, run_facts
from toolkit.runs.listing import list_runs
from toolkit.runs.status import record_of
from toolkit.wording import compact, span, visible


class View(NamedTuple):
    """A run at one moment."""

    line: str
    """For a log."""
    lines: list[str]
    """For a screen."""
    is_over: bool
    """Nothing more will come."""


def newest_running(root: str, registry_url: str | None) -> Path:
    """The run that was started last among those that train. Raises RunError: none does.

    The folders are asked, since the registry may not know yet that a run has just begun.
    """
    runs = [
        run
        for run in list_runs(root, registry_url=registry_url, check=True)
        if run.state == "running"
    ]
    if not runs:
        raise RunError("no run trains at the moment; name one: toolkit runs watch RUN")
    return Path(runs[-1].folder)


def views(folder: Path, *, seconds: float, width: int = 76) -> Iterator[View]:
    """The run every so many seconds, until it has ended.

    Raises:
        RunError: `folder` is no run, or is gone.
    """
    facts, read_at = run_facts(folder), -math.inf
    chart: list[str] = []
    while True:
        record = record_of(folder)
        if record is None:
            raise RunError(f"{folder}: the run is gone; it was moved or removed")
        facts.record = record
        now = time.monotonic()
        if now - read_at >= 5 * seconds or record.state != "running":
            # The curve of a long run takes longer to read than its last lines.
            facts, read_at = run_facts(folder), now
            train = read_history(folder, ["loss"], points=4_000, streams=["train"]).train
            chart = overlay({"o": train["loss"]}, width=width) if "loss" in train else []
        line = _line(facts)
        yield View(line, [f"{facts.title}  {line}", "", *chart], record.state != "running")
        if record.state != "running":
            return
        time.sleep(seconds)


def _line(facts: RunFacts) -> str:
    record = facts.record
    words = [f"step {record.step:,}" if record.step is not None else "starting"]
    if record.loss is not None:
        words.append(f"loss {record.loss:.4f}")
    if record.val_loss is not None:
        words.append(f"val loss {record.val_loss:.4f} (step {record.val_step:,})")
    if record.tokens_per_second is not None:
        words.append(f"{compact(record.tokens_per_second)} tok/s")
    if record.state != "running":
        words.append(record.state)
    elif (left := seconds_left(facts)) is not None:
        words.append(f"ETA {span(left)}")
    return visible("  ".join(words))


def seconds_left(facts: RunFacts) -> float | None:
    """How long until the asked-for steps or tokens are done, at the speed of the newest steps; None
    where that is not known."""
    duration = facts.config.get("trainer", {}).get("max_duration", {})
    unit, value = duration.get("unit"), duration.get("value")
    record, rate = facts.record, facts.record.tokens_per_second
    if not rate or not record.step or not record.tokens or not isinstance(value, int):
        return None
    done = {"steps": record.step, "tokens": record.tokens}.get(str(unit))
    if done is None:
        return None
    return max(0.0, (value - done) * (record.tokens / done) / rate)
