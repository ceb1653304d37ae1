"""What a report shows of runs, gathered from their folders: facts, charts and tables."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit.commands.report.charts import Axes, Chart, charts_of
from toolkit.commands.report.gaps import Throughput, throughput
from toolkit.commands.runs.compare import (
    Difference,
    compare,
    origin_of,
    parting_lines,
    sections,
    titles,
)
from toolkit.commands.runs.curves import LETTERS
from toolkit.commands.runs.listing import flat
from toolkit.config.secrets import mask_secrets
from toolkit.errors import RunError
from toolkit.metrics.history import History, Series, read_history
from toolkit.metrics.lines import read_records
from toolkit.runs.facts import AttemptFacts, RunFacts, run_facts
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import utc_text

TOLERANCE = 1e-3
"""Relative difference of two losses from which runs count as parted."""
_LONGEST_SAMPLE = 4_000
_MOST_SAMPLES = 20


class Score(msgspec.Struct, frozen=True):
    """One metric of the evaluations of a run."""

    name: str
    step: int
    last: float
    least: float | None
    """The least and the greatest that are numbers."""
    greatest: float | None
    number: int


class Setting(msgspec.Struct, frozen=True):
    """A value of a config."""

    path: str
    value: str
    origin: str


class Share(msgspec.Struct, frozen=True):
    """A source of a mixture."""

    source: str
    rows: int
    share: float
    asked: float | None
    """By the ratios of the config."""


class Sample(msgspec.Struct):
    """A text that the model wrote."""

    step: int
    prompt: str = ""
    text: str = ""


class Event(msgspec.Struct, frozen=True):
    """An attempt: which part of the curves it made."""

    attempt: AttemptFacts
    begin: Axes | None
    end: Axes | None


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a report."""

    title: str
    """Unlike those of the other runs."""
    facts: RunFacts
    scores: list[Score]
    shares: list[Share]
    samples: list[Sample]
    throughput: Throughput
    events: list[Event]
    settings: list[Setting]
    epochs: float | None
    """Passes over the data so far."""
    not_finite: int
    """Steps whose loss is no number."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Runs, and what is drawn of them."""

    made: str
    """When, ISO 8601 in UTC."""
    runs: list[RunReport]
    charts: dict[str, list[Chart]]
    """By section of the page."""
    not_drawn: dict[str, int]
    """Section -> charts that it has too many of."""
    differences: dict[str, list[Difference]]
    """Of several runs, as `toolkit runs compare` tells them."""
    partings: list[str]


def read_report(folders: Sequence[Path]) -> Report:
    """Gather a report of one run or more; also while they train.

    Raises:
        ConfigError: one of the runs is given twice.
        RunError: a folder is no run, or its metrics cannot be read.
    """
    found = compare(folders, tolerance=TOLERANCE) if len(folders) > 1 else None
    facts = found.runs if found is not None else [run_facts(folder) for folder in folders]
    names = titles(facts)
    histories = [read_history(folder, streams=History._fields) for folder in folders]
    runs = [_run(*each) for each in zip(names, facts, histories, strict=True)]
    charts, not_drawn = charts_of(names, histories)
    lines: list[str] = []
    for letter, parting in zip(LETTERS[1:], found.partings if found else [], strict=False):
        lines += parting_lines(letter, parting, TOLERANCE)
    return Report(
        made=utc_text(time.time()),
        runs=runs,
        charts=charts,
        not_drawn=not_drawn,
        differences=sections(found) if found is not None else {},
        partings=lines,
    )


def _run(title: str, facts: RunFacts, history: History) -> RunReport:
    folder = Path(facts.folder)
    loss, epoch = history.train.get("loss"), history.train.get("epoch")
    return RunReport(
        title=title,
        facts=facts,
        scores=[_score(name, series) for name, series in history.eval.items()],
        shares=_shares(facts, history),
        samples=_samples(folder),
        throughput=throughput(facts, history),
        events=_events(facts, loss),
        settings=_settings(facts),
        epochs=None if epoch is None or not len(epoch.value) else float(epoch.value[-1]),
        not_finite=0 if loss is None else int((~np.isfinite(loss.value)).sum()),
    )


def _score(name: str, series: Series) -> Score:
    known = series.value[np.isfinite(series.value)]
    return Score(
        name=name,
        step=int(series.step[-1]),
        last=float(series.value[-1]),
        least=float(known.min()) if len(known) else None,
        greatest=float(known.max()) if len(known) else None,
        number=len(series.step),
    )


def _shares(facts: RunFacts, history: History) -> list[Share]:
    rows = {
        name.removeprefix("instances/"): int(series.value[-1])
        for name, series in history.train.items()
        if name.startswith("instances/") and np.isfinite(series.value[-1])
    }
    ratios: dict[str, float] = {}
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
        sources = facts.config["dataset"]["mix"]["sources"]
        ratios = {name: float(source["ratio"]) for name, source in sources.items()}
    total, whole = sum(rows.values()), sum(ratios.values())
    return [
        Share(
            source=name,
            rows=number,
            share=number / total if total else 0.0,
            asked=ratios[name] / whole if name in ratios and whole else None,
        )
        for name, number in rows.items()
    ]


def _samples(folder: Path) -> list[Sample]:
    found: list[Sample] = []
    with contextlib.suppress(RunError, OSError):
        found = list(read_records(folder / RUN_FILES.samples, Sample))
    for sample in found:
        sample.text = sample.text[:_LONGEST_SAMPLE]
        sample.prompt = sample.prompt[:_LONGEST_SAMPLE]
    return found[-_MOST_SAMPLES:]


def _events(facts: RunFacts, loss: Series | None) -> list[Event]:
    events = []
    for attempt in facts.attempts:
        ends: list[Axes | None] = [None, None]
        if loss is not None and attempt.first_step is not None and attempt.last_step is not None:
            places = np.searchsorted(loss.step, [attempt.first_step, attempt.last_step])
            ends = [Axes.at(loss, min(int(place), len(loss.step) - 1)) for place in places]
        events.append(Event(attempt, *ends))
    return events


def _settings(facts: RunFacts) -> list[Setting]:
    found = []
    for path, value in flat(mask_secrets(facts.config)).items():
        text: Any = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        found.append(Setting(path, text, origin_of(facts.origins, path)))
    return found
