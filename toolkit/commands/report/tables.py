"""Tables of a report in which each run is a column."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from toolkit.commands.chart import shown
from toolkit.commands.report.reading import RunReport
from toolkit.config.secrets import mask_secrets
from toolkit.runs.facts import RunFacts
from toolkit.wording import compact, span

_MOST_PLACES = 8
_LEAST_IS_BEST = ("loss", "ppl", "bits_per_byte")


class Row(NamedTuple):
    """One value of each run."""

    name: str
    texts: list[str]
    best: set[int] = set()  # noqa: RUF012
    """The runs that have the best of several values; empty where none is better."""


def overview(runs: Sequence[RunReport]) -> list[Row]:
    """The first table of the page; rows of which nothing is known are left out."""
    each = [_overview(run) for run in runs]
    best = {
        "training loss": _best([run.facts.record.loss for run in runs], min),
        "validation loss": _best([run.facts.progress.val_loss for run in runs], min),
        "best validation loss": _best([run.facts.progress.best_val_loss for run in runs], min),
        "tokens/s": _best([run.throughput.median for run in runs], max),
    }
    rows = [Row(name, [texts[name] for texts in each], best.get(name, set())) for name in each[0]]
    return [row for row in rows if any(row.texts)]


def evaluations(runs: Sequence[RunReport]) -> list[Row]:
    """The newest value of each metric, of several runs."""
    names = dict.fromkeys(score.name for run in runs for score in run.scores)
    rows = []
    for name in names:
        scores = [next((one for one in run.scores if one.name == name), None) for run in runs]
        texts = [f"{one.last:.6g} (step {one.step:,})" if one else "" for one in scores]
        is_lower = name.rpartition("/")[2] in _LEAST_IS_BEST
        values = [one.last if one else None for one in scores]
        rows.append(Row(name, texts, _best(values, min) if is_lower else set()))
    return rows


def data(runs: Sequence[RunReport]) -> list[Row]:
    """What is known of the data of each run."""
    each = [_data(run) for run in runs]
    names = dict.fromkeys(name for known in each for name in known)
    return [Row(name, [known.get(name, "") for known in each]) for name in names]


def _data(run: RunReport) -> dict[str, str]:
    facts = run.facts
    dataset = facts.config.get("dataset")
    dataset = dataset if isinstance(dataset, dict) else {}
    source, tokenizer = dataset.get("source"), dataset.get("tokenizer")
    found: dict[str, Any] = {}
    if dataset.get("mix"):
        found["name"] = "a mixture"
    elif dataset.get("dataset_name"):
        found["name"] = f"{dataset['dataset_name']}/{dataset.get('dataset_config')}"
    if isinstance(source, dict):
        place = source.get("paths") or source.get("path") or source.get("name")
        places = place if isinstance(place, list) else [place] if place else []
        here = f"{facts.command.get('cwd', '')}/"
        shorter = (str(one).removeprefix(here) for one in places[:_MOST_PLACES])
        found["text"] = ", ".join([str(source.get("type", "")), *shorter])
    if isinstance(tokenizer, dict):
        more = [str(tokenizer[key]) for key in ("vocab_size", "path") if tokenizer.get(key)]
        found["tokenizer"] = ", ".join([str(tokenizer.get("type", "")), *more])
    tokens = facts.record.tokens
    if run.epochs and tokens:
        found["tokens of an epoch"] = f"about {compact(tokens / run.epochs)}"
        found["epochs so far"] = f"{run.epochs:.2f}"
    known = {name: value for name, value in facts.data.items() if isinstance(value, str | int)}
    found |= {name: value for name, value in known.items() if name != "batch"}  # of the checkpoint
    return {name: str(mask_secrets(str(value))) for name, value in found.items()}


def _best(values: Sequence[float | None], better: Callable[..., float]) -> set[int]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < 2 or len(set(known)) < 2:
        return set()
    best = better(known)
    return {number for number, value in enumerate(values) if value == best}


def _overview(run: RunReport) -> dict[str, str]:
    facts, record, progress = run.facts, run.facts.record, run.facts.progress
    state = record.state
    if facts.status.exit_reason not in (None, "done") and state != "running":
        state += f" ({facts.status.exit_reason})"
    if facts.status.message:
        state += f": {mask_secrets(facts.status.message)}"
    val = best = ""
    if progress.val_loss is not None:
        val = f"{progress.val_loss:.6g} ({progress.val_name}, step {progress.val_step:,})"
    if progress.best_val_loss is not None:
        best = f"{progress.best_val_loss:.6g} (step {progress.best_val_step:,})"
    machine = f"{record.engine} x {record.world_size}" if record.engine else ""
    precision = facts.engine.get("precision")
    rows = {
        "state": state,
        "id": facts.id,
        "folder": facts.folder,
        "mirror": str(mask_secrets(record.mirror)) if record.mirror else "",
        "tags": ", ".join(facts.tags),
        "note": facts.note,
        "started": record.created,
        "duration": "" if facts.seconds is None else span(facts.seconds),
        "steps": _steps(run),
        "tokens": "" if record.tokens is None else f"{record.tokens:,}",
        "tokens/s": "" if run.throughput.median is None else compact(run.throughput.median),
        "training loss": "" if record.loss is None else f"{record.loss:.6g}",
        "validation loss": val,
        "best validation loss": best,
        "steps whose loss is no number": str(run.not_finite) if run.not_finite else "",
        "parameters": "" if record.parameters is None else shown(record.parameters),
        "layers x width": _size(facts),
        "engine x processes": f"{machine} ({precision})" if precision and machine else machine,
        "host": record.host,
        "code": _code(facts.git),
    }
    return rows


def _steps(run: RunReport) -> str:
    """How many of how many, and how long the rest takes."""
    record, trainer = run.facts.record, run.facts.config.get("trainer")
    if record.step is None:
        return ""
    text = f"{record.step:,}"
    goal = trainer.get("max_duration") if isinstance(trainer, dict) else None
    if not isinstance(goal, dict) or type(goal.get("value")) is not int:
        return text
    text += f" (asked for: {goal['value']:,} {goal.get('unit', '')})"
    rate, tokens = record.tokens_per_second, record.tokens
    each = {"steps": (tokens or 0) / (record.step or 1), "tokens": 1}.get(str(goal.get("unit")))
    if record.state == "running" and rate and tokens and each:
        whole = goal["value"] * each
        text += f", about {span(max(0.0, whole - tokens) / rate)} to go"
    return text


def _size(facts: RunFacts) -> str:
    model = facts.config.get("model")
    sizes = [model.get("num_layers"), model.get("d_model")] if isinstance(model, dict) else [None]
    return " x ".join(map(str, sizes)) if all(type(size) is int for size in sizes) else ""


def _code(git: dict[str, Any]) -> str:
    if not git.get("commit"):
        return ""
    branch = f" on {git['branch']}" if git.get("branch") else ""
    dirty = ", with uncommitted changes" if git.get("dirty") else ""
    return f"{git['commit']}{branch}{dirty}"
