"""The points of a sweep: their values, names, configs and folders."""

import hashlib
import itertools
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.commands.load import load
from toolkit.config.overrides import parse_value
from toolkit.config.paths import LONGEST_NAME, path_problem
from toolkit.config.types import path_hint, paths_to, type_of
from toolkit.errors import BadInputError, ConfigError, SeveralErrors
from toolkit.experiment.changes import config_changes
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.found_data import started_in
from toolkit.experiment.load import LoadedExperiment
from toolkit.experiment.recorded import has_config, stored_config
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import has_trained, is_run, resolve_run_folder

_OWN = ("run.name", "run.save_folder", "run.mirror")
"""Each point has one of its own, or none."""
_UNSAFE = re.compile(r"[\s/\\'\"{}\[\]:;*?<>|]+")
_MOST_POINTS = 10_000
_MOST_CHANGES = 3


class Axis(NamedTuple):
    """One `--grid`."""

    path: str
    """In full."""
    texts: tuple[str, ...]
    """Of each value, as typed."""
    typed: str
    """The path as typed."""


class Point(NamedTuple):
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """Full path -> value, as typed."""
    folder: Path
    loaded: LoadedExperiment

    @property
    def flags(self) -> list[str]:
        return [f"--{path}={text}" for path, text in self.values.items()]


def axes(grids: Sequence[str]) -> list[Axis]:
    """The axes that `--grid PATH=VALUE,VALUE,...` ask for.

    Raises:
        ConfigError: no path of a config, one that several values have, or no values.
    """
    found = [_axis(text) for text in grids]
    if not found:
        raise ConfigError("give --grid PATH=VALUE,VALUE, as in --grid optim.lr=1e-3,3e-3")
    paths = [axis.path for axis in found]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ConfigError(f"--grid {twice[0]}: stands there twice; give all its values in one")
    return found


def _axis(text: str) -> Axis:
    typed, equals, values = text.partition("=")
    typed = typed.strip().removeprefix("--")
    if not equals or not typed:
        raise ConfigError(f"--grid {text}: write PATH=VALUE,VALUE, as in optim.lr=1e-3,3e-3")
    path, texts = _full_path(typed), _split(values)
    if not all(texts):
        raise ConfigError(f"--grid {text}: a value is empty; write the values with commas between")
    known: list[Any] = []
    for value_text in texts:
        value = parse_value(value_text, None, f"--grid {typed}")
        if value in known:
            same = texts[known.index(value)]
            twice = "stands there twice" if same == value_text else f"is the same value as {same}"
            raise ConfigError(f"--grid {text}: {value_text} {twice}")
        known.append(value)
    return Axis(path, tuple(texts), typed)


def _full_path(typed: str) -> str:
    """`train_module.optim.lr` for `optim.lr`, where no other value is called so."""
    path = typed.replace("-", "_")
    if path in _OWN:
        raise ConfigError(f"--grid {typed}: every point has its own; --name names the sweep")
    first, root = path.partition(".")[0], type_of(ExperimentConfig)
    if first in ExperimentConfig.__struct_fields__:
        return path  # whether there is such a value, the check of each point tells
    alike = [full for full in paths_to(root, path, None) if f".{full}".endswith(f".{path}")]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise ConfigError(f"--grid {typed}: could be {' or '.join(alike)}; write one of them")
    raise ConfigError(f"--grid {typed}: no such config value; {path_hint(root, path)}")


def _split(text: str) -> list[str]:
    """Cut at commas that are not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def choose(found: Sequence[Axis], number: int | None, seed: int) -> list[dict[str, str]]:
    """Every point of the grid, or `number` of them drawn by `seed`, in the order of the grid.

    Raises:
        ConfigError: more than 10,000 points, or no positive number.
    """
    size = 1
    for axis in found:
        size *= len(axis.texts)
    if number is not None and number < 1:
        raise ConfigError(f"--random {number}: give 1 or more")
    if number is None and size > _MOST_POINTS:
        raise ConfigError(f"the grid has {size:,} points; draw some of them with --random N")
    chosen: Sequence[int] = range(size)
    if number is not None and number < size:
        chosen = sorted(random.Random(seed).sample(chosen, number))
    return [_values(found, place) for place in chosen]


def _values(found: Sequence[Axis], place: int) -> dict[str, str]:
    values: list[tuple[str, str]] = []
    for axis in reversed(found):
        place, number = divmod(place, len(axis.texts))
        values.append((axis.path, axis.texts[number]))
    return dict(reversed(values))


def points(
    config: str,
    overrides: Sequence[str],
    chosen: Sequence[Mapping[str, str]],
    *,
    name: str,
    environ: Mapping[str, str] = os.environ,
    **options: Any,
) -> list[Point]:
    """The points with their configs, each checked as `toolkit train --dry-run` checks it.

    Args:
        overrides: what all of them share, as flags.
        name: of the sweep; the names of its runs begin with it.
        environ: what the processes of a run see of their launcher.
        options: of `commands.load.load`: base, sequence_length, data_root, work_dir.

    Raises:
        ConfigError, SeveralErrors: points that cannot be trained, or whose run was started with
            another config.
    """
    for flag in overrides:
        path = flag.partition("=")[0].removeprefix("--")
        if path in _OWN:
            raise ConfigError(f"--{path}: every point has its own; --name names the sweep")
    paths = list(chosen[0])
    labels = _labels(paths)
    found: list[Point] = []
    problems: dict[str, BadInputError] = {}
    for values in chosen:
        own = _run_name(name, [f"{labels[path]}={text}" for path, text in values.items()])
        flags = [f"--{path}={text}" for path, text in values.items()]
        try:
            found.append(_point(config, [*overrides, *flags], own, dict(values), environ, options))
        except BadInputError as error:
            problems[own] = error
    if problems:
        texts = {str(error) for error in problems.values()}
        if len(texts) == 1 and len(problems) == len(chosen):
            raise next(iter(problems.values()))
        several = [
            ConfigError(f"{own}: {one}")
            for own, error in problems.items()
            for one in (error.errors if isinstance(error, SeveralErrors) else [error])
        ]
        raise several[0] if len(several) == 1 else SeveralErrors(several)
    for one, other in itertools.pairwise(sorted(found, key=lambda point: point.folder)):
        if one.folder == other.folder:
            raise ConfigError(f"{one.name}: two points have this name; spell their values apart")
    return found


def _point(
    config: str,
    flags: Sequence[str],
    name: str,
    values: dict[str, str],
    environ: Mapping[str, str],
    options: Mapping[str, Any],
) -> Point:
    loaded = load(config, flags, starts=False, name=name, environ=environ, **options)
    folder = resolve_run_folder(loaded.config.run, name)
    if not has_trained(folder):  # what a start would refuse
        loaded = load(config, flags, starts=True, name=name, environ=environ, **options)
    elif is_run(folder) and has_config(folder):
        command = folder / RUN_FILES.command
        changes = config_changes(stored_config(folder), loaded.stored, started_in(command))
        if changes:
            more = f" and {len(changes) - _MOST_CHANGES} more" if len(changes) > 3 else ""
            raise ConfigError(
                f"{folder} was started with another config "
                f"({', '.join(changes[:_MOST_CHANGES])}{more}); choose another --name, or remove "
                f"it: toolkit runs rm {folder}"
            )
    return Point(name, values, folder, loaded)


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """The shortest endings of paths that tell them apart: `lr`, or `optim.lr`."""
    labels: dict[str, str] = {}
    for path in paths:
        words = path.split(".")
        for number in range(1, len(words) + 1):
            label = ".".join(words[-number:])
            others = [other for other in paths if other != path]
            if not any(f".{other}".endswith(f".{label}") for other in others):
                break
        labels[path] = label
    return labels


def _run_name(sweep: str, words: Sequence[str]) -> str:
    name = "-".join([sweep, *(_UNSAFE.sub("_", word).strip("_") for word in words)])
    if len(os.fsencode(name)) > LONGEST_NAME // 2:
        digest = hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()
        name = f"{os.fsencode(name)[: LONGEST_NAME // 2].decode(errors='ignore')}-{digest}"
    if problem := path_problem(name, "name"):
        raise ConfigError(f"--name: {problem}")
    return name
