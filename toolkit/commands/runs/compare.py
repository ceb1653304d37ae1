"""`toolkit runs compare` and `diff`: what differs between runs, and where their losses part."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit.commands.runs.listing import flat
from toolkit.config import convert
from toolkit.config.secrets import mask_secrets
from toolkit.errors import ConfigError
from toolkit.experiment.changes import is_same_place
from toolkit.experiment.config import ExperimentConfig
from toolkit.metrics.history import Series, read_history
from toolkit.runs.facts import RunFacts, run_facts
from toolkit.wording import count

UNSET = "-"
_OF_ITSELF = ("run.",)
"""What a run is called and where it is: it differs between any two."""
_POINTS = 4_000
_LONGEST = 60
"""Characters of a value in a table."""


class Difference(msgspec.Struct, frozen=True):
    """One value that is not the same in all runs."""

    path: str
    values: list[Any]
    """Of each run; `UNSET` where it has none."""
    origins: list[str]
    """Where each value came from; empty where nothing tells."""


class Parting(msgspec.Struct, frozen=True, kw_only=True):
    """How the training losses of a run compare with those of the first."""

    title: str
    folder: str
    compared: int
    """Steps that both have."""
    last_equal: int | None = None
    """The last step up to which every common loss is the same to the last bit."""
    first_step: int | None = None
    """The first one where they are not; None: never."""
    losses: tuple[float, float] | None = None
    """There, of the first run and of this one."""
    beyond_step: int | None = None
    """The first one where they differ by more than the tolerance, relative to the first run's."""
    largest: float = 0.0
    """Largest relative difference."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between two runs or more; what is equal is left out."""

    runs: list[RunFacts]
    config: list[Difference]
    code: list[Difference]
    data: list[Difference]
    engine: list[Difference]
    environment: list[Difference]
    partings: list[Parting]
    curves: dict[str, Series] = {}
    """Title of a run -> its training loss, perhaps fewer points."""


def compare(
    folders: Sequence[Path], *, tolerance: float = 1e-3, everything: bool = False
) -> Comparison:
    """Read runs and set them side by side, all of them against the first.

    Args:
        tolerance: relative difference of two losses from which they count as parted.
        everything: the names and places of the runs too.

    Raises:
        ConfigError: fewer than two runs, or one of them twice; no usable tolerance.
        RunError: a folder is no run, or its metrics cannot be read.
    """
    if len(folders) < 2:
        raise ConfigError("give two runs or more to compare")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("the same run stands there twice; give each once")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance {tolerance}: give a relative difference, as 1e-3")
    runs = [run_facts(folder) for folder in folders]
    losses = [read_history(folder, ["loss"], streams=["train"]).train for folder in folders]
    series = [found.get("loss", _EMPTY) for found in losses]
    left_out = () if everything else _OF_ITSELF
    configs = [_whole(run.config) for run in runs]
    return Comparison(
        runs=runs,
        config=_elsewhere(
            differences(configs, left_out=left_out, origins=[run.origins for run in runs]), runs
        ),
        code=differences([_code(run) for run in runs]),
        data=differences([run.data for run in runs], left_out=("batch", "segments", "sources")),
        engine=differences([run.engine for run in runs]),
        environment=differences([_environment(run) for run in runs]),
        partings=[
            part(run, first, other, tolerance)
            for first in series[:1]
            for run, other in zip(runs[1:], series[1:], strict=True)
        ],
        curves={title: _fewer(s) for title, s in zip(titles(runs), series, strict=True)},
    )


def titles(runs: Sequence[RunFacts]) -> list[str]:
    """What each run is called beside the others: shorter names where they are enough."""
    for name in (lambda run: run.record.name, lambda run: run.title):
        if len({name(run) for run in runs}) == len(runs):
            return [name(run) for run in runs]
    return [f"{run.title} ({run.id})" for run in runs]


def differences(
    mappings: Sequence[Mapping[str, Any]],
    *,
    left_out: Sequence[str] = (),
    origins: Sequence[Mapping[str, str]] = (),
) -> list[Difference]:
    """The values by dotted path that are not the same everywhere, secrets masked; a path that
    begins like one `left_out` is none of them."""
    flats = [flat(mapping) if mapping else {} for mapping in mappings]
    found = []
    for path in dict.fromkeys(path for values in flats for path in values):
        values = [values.get(path, UNSET) for values in flats]
        if all(value in (None, UNSET) for value in values) or path.startswith(tuple(left_out)):
            continue  # null and absent say the same
        if any(not _same(value, values[0]) for value in values):
            name = path.rpartition(".")[2]
            shown_values = [mask_secrets({name: value})[name] for value in values]
            found.append(Difference(path, shown_values, [origin_of(o, path) for o in origins]))
    return found


def _elsewhere(found: list[Difference], runs: Sequence[RunFacts]) -> list[Difference]:
    """Without the paths that lead to the same place from where each run was started."""
    folders = [Path(run.cwd or "/") for run in runs]
    return [
        difference
        for difference in found
        if not all(
            is_same_place(difference.values[0], value, folders[0], folder)
            for value, folder in zip(difference.values[1:], folders[1:], strict=True)
        )
    ]


def part(run: RunFacts, first: Series, other: Series, tolerance: float) -> Parting:
    """Compare the losses of the steps that both have."""
    steps, here, there = np.intersect1d(
        first.step, other.step, assume_unique=True, return_indices=True
    )
    one, two = first.value[here], other.value[there]
    is_same = (one == two) | (np.isnan(one) & np.isnan(two))
    parting = Parting(title=run.title, folder=run.folder, compared=len(steps))
    if is_same.all():
        last = int(steps[-1]) if len(steps) else None
        return msgspec.structs.replace(parting, last_equal=last)
    at = int(is_same.argmin())
    with np.errstate(all="ignore"):
        relative = np.where(is_same, 0.0, np.abs(one - two) / np.abs(one))
    relative[~np.isfinite(relative)] = np.inf
    is_beyond = relative > tolerance
    return msgspec.structs.replace(
        parting,
        last_equal=int(steps[at - 1]) if at else None,
        first_step=int(steps[at]),
        losses=(float(one[at]), float(two[at])),
        beyond_step=int(steps[is_beyond.argmax()]) if is_beyond.any() else None,
        largest=float(relative.max()),
    )


def sections(found: Comparison) -> dict[str, list[Difference]]:
    """What was compared, by name."""
    names = ("config", "code", "data", "engine", "environment")
    return {name: getattr(found, name) for name in names}


def shown(difference: Difference, number: int, *, whole: bool = False) -> str:
    """The value of one run as text, with where it came from; long ones cut unless `whole`."""
    value = difference.values[number]
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text) > _LONGEST and not whole:
        text = f"{text[:_LONGEST]}..."
    origin = difference.origins[number] if difference.origins else ""
    if not origin:
        return text
    if origin.startswith(f"--{difference.path}="):
        return f"{text} (flag)"
    return f"{text} ({origin.partition('=')[0] if origin.startswith('--') else origin})"


def parting_lines(letter: str, parting: Parting, tolerance: float) -> list[str]:
    """Where the losses of run `letter` part from those of A, in words."""
    if not parting.compared:
        return [f"{letter}: no step in common with A"]
    common = count(parting.compared, "step")
    if parting.first_step is None or parting.losses is None:
        return [f"{letter}: the losses are A's, bit for bit, in all {common} that both have"]
    one, two = parting.losses
    lines = [
        f"{letter}: parts from A at step {parting.first_step:,}: loss {one!r} and {two!r}",
        f"   its batch: toolkit batch {shlex.quote(parting.folder)} {parting.first_step}",
    ]
    if parting.beyond_step is None:
        lines.append(
            f"   never by more than {tolerance:g} of the loss (largest: {parting.largest:.2g}) in "
            f"{common}"
        )
    elif parting.beyond_step != parting.first_step:
        lines.append(f"   by more than {tolerance:g} of the loss from step {parting.beyond_step:,}")
    return lines


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison for machines, without the curves."""
    runs = [
        {"id": run.id, "title": run.title, "folder": run.folder, **_numbers(run)}
        for run in found.runs
    ]
    return {"runs": runs, **sections(found), "partings": found.partings}


def _numbers(run: RunFacts) -> dict[str, Any]:
    names = ("state", "step", "tokens", "loss", "val_loss", "best_val_loss", "tokens_per_second")
    return {name: getattr(run.record, name) for name in names}


_EMPTY = Series(*(np.empty(0, kind) for kind in (np.int64, np.int64, np.float64, np.float64)))


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def origin_of(origins: Mapping[str, str], path: str) -> str:
    """Where a value came from, or the mapping that it was given in, secrets masked; empty: a
    default."""
    while path:
        if path in origins:
            return str(mask_secrets(origins[path]))
        path = path.rpartition(".")[0]
    return ""


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of what a later release has added: that is no difference."""
    try:
        return msgspec.json.decode(msgspec.json.encode(convert(config, ExperimentConfig)))
    except Exception:  # parts of the user's own, or of another release
        return config


def _code(run: RunFacts) -> dict[str, Any]:
    git = {name: run.git.get(name) for name in ("commit", "branch", "dirty") if name in run.git}
    return git | {"toolkit": _mapping(run.environment.get("versions")).get("toolkit")}


def _environment(run: RunFacts) -> dict[str, Any]:
    known = dict(run.environment)
    versions = _mapping(known.pop("versions", {}))
    return known | {"versions": {n: v for n, v in versions.items() if n != "toolkit"}}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _fewer(series: Series) -> Series:
    """Every so many lines: a terminal shows a hundred."""
    every = max(1, len(series.step) // _POINTS)
    return Series._make(column[::every] for column in series)
