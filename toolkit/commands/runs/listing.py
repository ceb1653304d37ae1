"""`toolkit runs list`: which runs, and in which order."""

import fnmatch
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from toolkit.commands.runs.sweeping import sweep
from toolkit.config.overrides import parse_value
from toolkit.config.paths import local_path
from toolkit.config.types import nearest, path_hint, paths_to, type_of
from toolkit.errors import ConfigError, RunError
from toolkit.runs import listing
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import absolute
from toolkit.runs.status import RunRecord, RunState, unix_seconds
from toolkit.storage.foreign import read_json
from toolkit.storage.remote import is_url

STATES = (*get_args(RunState), "dead", "missing")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])\Z")

COLUMNS: dict[str, Callable[[RunRecord], Any]] = {
    "name": lambda run: (run.experiment, run.name),
    "state": lambda run: run.state,
    "step": lambda run: run.step,
    "tokens": lambda run: run.tokens,
    "loss": lambda run: run.loss,
    "val-loss": lambda run: run.val_loss,
    "best": lambda run: run.best_val_loss,
    "speed": lambda run: run.tokens_per_second,
    "duration": lambda run: run.seconds,
    "age": lambda run: -(unix_seconds(run.created) or 0.0),
    "updated": lambda run: run.updated,
}
"""What runs are sorted by."""


class Wanted(NamedTuple):
    """Which runs are listed; what is empty or None asks for nothing."""

    states: Sequence[str] = ()
    tags: Sequence[str] = ()
    """All of them."""
    name: str | None = None
    """A pattern as of a shell, for the name or experiment/name."""
    since: str | None = None
    """Started at most as long ago, as 2d."""
    where: Sequence[str] = ()
    """`PATH=VALUE` of the config: all of them."""
    sort: str | None = None
    """One of `COLUMNS`, smallest first; what has no value comes last. None: oldest first."""
    reverse: bool = False
    limit: int | None = None
    """The first ones; where nothing is sorted, the newest."""


def list_all(
    root: str, registry_url: str | None, wanted: Wanted | None = None, *, check: bool = True
) -> list[RunRecord]:
    """The runs of a root, or at a URL. `check` reads every folder instead of the registry.

    Raises:
        ConfigError: the root is not there, or what is wanted says nothing that runs have.
    """
    wanted = wanted or Wanted()
    fits, places = _filters(wanted), [_Where(text) for text in wanted.where]
    if is_url(root):
        from toolkit.launch.remote_run import runs_at

        runs = runs_at(root)
    else:
        check_root(root)
        runs = listing.list_runs(root, registry_url=registry_url, check=check)
    runs = [run for run in runs if all(fit(run) for fit in fits)]
    for place in places:  # last: it reads a file of each run that is left
        runs = place.among(runs)
    return _sorted(runs, wanted)


def as_json(record: RunRecord) -> dict[str, Any]:
    """A record for machines: its id first, and its age in seconds."""
    created = unix_seconds(record.created)
    values = msgspec.structs.asdict(record)
    tags = [tag for tag in (record.tags or "").split(",") if tag]
    age = None if created is None else max(0.0, time.time() - created)
    return {"id": values.pop("id"), **values, "age": age, "tags": tags}


def reindex(root: str, registry_url: str | None) -> int:
    """Rebuild the registry, and delete what removals that were cut short left; the number of runs
    in it."""
    check_root(root)
    for experiment in absolute(root).glob("*/"):
        sweep(experiment)
    return listing.reindex(root, registry_url=registry_url)


def check_root(root: str) -> None:
    """Raise ConfigError where a root that was named is no folder."""
    if root != "runs" and not local_path(root, "--root").is_dir():
        raise ConfigError(f"--root: {root}: no such folder")


def span_seconds(text: str, option: str) -> float:
    """Seconds of a time like `90s`, `15m`, `2h`, `3d` or `1w`. Raises ConfigError."""
    if (match := _SPAN.match(text.strip())) is None:
        raise ConfigError(f"{option} {text}: write a number and s, m, h, d or w, as in 2d")
    return float(match[1]) * _UNITS[match[2]]


def _filters(wanted: Wanted) -> list[Callable[[RunRecord], bool]]:
    fits: list[Callable[[RunRecord], bool]] = []
    states = {word for text in wanted.states for word in text.split(",") if word}
    if unknown := sorted(states - {*STATES}):
        raise ConfigError(f"--state {unknown[0]}: there are {', '.join(STATES)}")
    if states:
        fits.append(lambda run: run.state in states)
    if wanted.sort is not None and wanted.sort not in COLUMNS:
        near = nearest(wanted.sort, COLUMNS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(COLUMNS)}"
        raise ConfigError(f"--sort {wanted.sort}: no such column; {hint}")
    if wanted.limit is not None and wanted.limit < 1:
        raise ConfigError(f"--limit {wanted.limit}: give 1 or more")
    tags = {word for text in wanted.tags for word in text.split(",") if word}
    if tags:
        fits.append(lambda run: tags <= {*(run.tags or "").split(",")})
    if (pattern := wanted.name) is not None:
        fits.append(
            lambda run: any(
                fnmatch.fnmatchcase(name, pattern)
                for name in (run.name, f"{run.experiment}/{run.name}")
            )
        )
    if wanted.since is not None:
        oldest = time.time() - span_seconds(wanted.since, "--since")
        fits.append(lambda run: (unix_seconds(run.created) or -math.inf) >= oldest)
    return fits


class _Where:
    """One `--where`."""

    def __init__(self, typed: str) -> None:
        path, equals, self._text = typed.partition("=")
        if not equals or not path:
            raise ConfigError(f"--where {typed}: write PATH=VALUE, as in optim.lr=1e-3")
        self._path = path.removeprefix("--")
        self._value = parse_value(self._text, None, "--where")

    def among(self, runs: Sequence[RunRecord]) -> list[RunRecord]:
        """The runs whose config has the value. Raises ConfigError where no config has the path."""
        found = [(run, self._values(run)) for run in runs]
        if not any(values for _, values in found):
            self._check()
        return [
            run
            for run, values in found
            if any(own == self._value or str(own) == self._text for own in values)
        ]

    def _values(self, run: RunRecord) -> list[Any]:
        try:
            config = read_json(Path(run.folder) / RUN_FILES.config, RunError)
        except (OSError, RunError):
            return []
        return [v for p, v in flat(config).items() if f".{p}".endswith(f".{self._path}")]

    def _check(self) -> None:
        from toolkit.experiment.config import ExperimentConfig  # a list needs it only here

        root, path = type_of(ExperimentConfig), self._path
        if not any(f".{full}".endswith(f".{path}") for full in paths_to(root, path)):
            hint = path_hint(root, path)
            raise ConfigError(f"--where {path}: no such config value, and no run has one; {hint}")


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """The values of a config by dotted path; lists of mappings go by number."""
    if isinstance(config, dict) and config:
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(item, dict) for item in config):
        items = [(str(number), item) for number, item in enumerate(config)]
    else:
        return {path: config}
    found: dict[str, Any] = {}
    for name, value in items:
        found |= flat(value, f"{path}.{name}" if path else name)
    return found


def _sorted(runs: list[RunRecord], wanted: Wanted) -> list[RunRecord]:
    if wanted.sort is None:
        if wanted.limit is not None:
            runs = runs[-wanted.limit :]
        return runs[::-1] if wanted.reverse else runs
    value = COLUMNS[wanted.sort]

    def is_known(run: RunRecord) -> bool:
        found = value(run)
        return found is not None and not (isinstance(found, float) and math.isnan(found))

    known = sorted(filter(is_known, runs), key=value, reverse=wanted.reverse)
    ordered = known + [run for run in runs if not is_known(run)]
    return ordered[: wanted.limit]
