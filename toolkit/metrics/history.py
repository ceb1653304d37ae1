"""The metrics of a run as columns, read back from its files of JSON lines.

A file is read in blocks of whole lines; each block is decoded at once and turned into arrays, so
that memory follows the numbers and not the Python objects of a long run. What an interrupted
attempt wrote after the step that a later one went on from is left out: of a step, the last line
counts.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from toolkit.errors import RunError
from toolkit.storage.foreign import MAX_LINE_BYTES, check_regular, guard

AXES = ("step", "tokens", "time")
_BLOCK = 4 << 20
_NOT_VALUES = {*AXES, "name"}
_LINE = msgspec.json.Decoder(dict[str, Any])
_UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
_NO_TOKENS = -1
_MOST = 1 << 62
"""Steps and tokens are below; files from elsewhere may hold anything."""


class Series(NamedTuple):
    """One metric over a run: four arrays of shape (lines,)."""

    step: np.ndarray
    """int64, ascending."""
    tokens: np.ndarray
    """int64: training tokens consumed; -1 where the line does not tell (system metrics)."""
    time: np.ndarray
    """float64: Unix seconds; nan where the line does not tell."""
    value: np.ndarray
    """float64; nan and infinities are what was recorded."""


class History(NamedTuple):
    """Name of a metric -> its values. Metrics of an evaluation are called "val/loss"."""

    train: dict[str, Series]
    eval: dict[str, Series]
    network: dict[str, Series]
    system: dict[str, Series]


def read_history(
    run_dir: Path,
    names: Collection[str] | None = None,
    points: int | None = None,
    *,
    streams: Collection[str] = ("train", "eval"),
) -> History:
    """The metrics of the run in `run_dir`, of all its attempts; also while it trains.

    Args:
        names: only these; of evaluations, "val/loss" or "loss" for the loss of each.
        points: at most about this many of each metric. A longer one is cut into `points // 2`
            spans of lines, and the least and the greatest value of each are kept, with their steps.
        streams: which of metrics/{train,eval,network,system}.jsonl to read; the others are empty.

    A file that is not there has no metrics. Damaged lines, and the one that is being written, are
    left out.

    Raises:
        RunError: a file is no regular file, cannot be read, or has a line without end.
    """
    found = {
        stream: _read(run_dir / "metrics" / f"{stream}.jsonl", names) if stream in streams else {}
        for stream in History._fields
    }
    if points is not None:
        found = {
            stream: {name: down_sampled(series, points) for name, series in all_.items()}
            for stream, all_ in found.items()
        }
    return History(**found)


def down_sampled(series: Series, points: int) -> Series:
    """`series` with at most about `points` lines, minima and maxima kept (see `read_history`)."""
    number, spans = len(series.step), max(1, points // 2)
    if number <= max(points, 2):
        return series
    edges = np.linspace(0, number, spans + 1).astype(np.int64)
    kept: list[int] = [0, number - 1]  # where a curve begins and ends is what people look at
    for begin, end in itertools.pairwise(edges):
        part = series.value[begin:end]
        known = np.isfinite(part)
        if known.any():
            kept += [
                int(begin + np.where(known, part, np.inf).argmin()),
                int(begin + np.where(known, part, -np.inf).argmax()),
            ]
        if not known.all():
            kept.append(int(begin + known.argmin()))
    chosen = np.unique(np.array(kept, np.int64))
    return Series._make(column[chosen] for column in series)


class _Block(NamedTuple):
    """The lines of one name (of an evaluation) in one block of a file."""

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    values: dict[str, tuple[np.ndarray, np.ndarray]]
    """Metric -> which of the lines have it, and their values."""


def _read(path: Path, names: Collection[str] | None) -> dict[str, Series]:
    blocks: dict[str, list[_Block]] = {}
    for lines in _blocks(path):
        for name, same in _by_name(lines).items():
            blocks.setdefault(name, []).append(_columns(same, name, names))
    found: dict[str, Series] = {}
    for name, parts in blocks.items():
        step, tokens, time = map(np.concatenate, zip(*(p.axes for p in parts), strict=True))
        stays = _not_written_again(step, is_repeated=path.stem == "system")
        for metric in dict.fromkeys(m for part in parts for m in part.values):
            places, values, start = [], [], 0
            for part in parts:
                if metric in part.values:
                    places.append(part.values[metric][0] + start)
                    values.append(part.values[metric][1])
                start += len(part.axes[0])
            place, value = np.concatenate(places), np.concatenate(values)
            kept = stays[place]
            if not kept.all():
                place, value = place[kept], value[kept]
            series = Series(step, tokens, time, value)
            if len(place) < start:
                series = Series(step[place], tokens[place], time[place], value)
            found[_key(name, metric)] = series
    return found


def _blocks(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The whole lines of a file, block by block."""
    with guard(path, RunError):
        try:
            check_regular(path, RunError)
            file = path.open("rb")
        except FileNotFoundError:
            return
    with file:
        rest = b""
        while data := file.read(_BLOCK):
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                raise RunError(
                    f"{path}: has a line of more than {MAX_LINE_BYTES:,} bytes; move it away"
                )
            if newline and (lines := _decoded(whole)):
                yield lines


def _decoded(data: bytes) -> list[dict[str, Any]]:
    try:
        lines = _LINE.decode_lines(data)
    except _UNREADABLE:
        lines = []
        for line in data.splitlines():
            try:
                lines.append(_LINE.decode(line))
            except _UNREADABLE:
                continue
    return [ln for ln in lines if type(step := ln.get("step")) is int and 0 <= step < _MOST]


def _by_name(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = [line.get("name") for line in lines]
    if not any(names):
        return {"": lines}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, line in zip(names, lines, strict=True):
        found.setdefault(name if isinstance(name, str) else "", []).append(line)
    return found


def _columns(lines: list[dict[str, Any]], name: str, names: Collection[str] | None) -> _Block:
    first = [*lines[0]]
    later = sorted(set().union(*lines).difference(first))
    metrics = dict.fromkeys(key for key in [*first, *later] if key not in _NOT_VALUES)
    if names is not None:
        metrics = {m: None for m in metrics if m in names or _key(name, m) in names}
    values = {}
    for metric in metrics:
        place, value = _numbers([line.get(metric) for line in lines])
        if len(place):
            values[metric] = place, value
    step = np.array([line["step"] for line in lines], np.int64)
    tokens = np.full(len(lines), _NO_TOKENS, np.int64)
    place, number = _numbers([line.get("tokens") for line in lines])
    is_count = (number >= 0) & (number < _MOST)
    tokens[place[is_count]] = number[is_count]
    time = np.full(len(lines), np.nan)
    place, number = _numbers([line.get("time") for line in lines])
    time[place] = number
    return _Block((step, tokens, time), values)


def _numbers(column: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which of `column` are numbers, and these. JSON has no nan: it is written as text."""
    try:
        if None not in column:
            numbers_alone = np.array(column, np.float64)
            if numbers_alone.ndim == 1:
                return np.arange(len(column)), numbers_alone
    except (ValueError, TypeError):
        pass
    place, numbers = [], []
    for n, value in enumerate(column):
        if isinstance(value, int | float | str):
            try:
                numbers.append(float(value))
            except (ValueError, OverflowError):
                continue
            place.append(n)
    return np.array(place, np.int64), np.array(numbers, np.float64)


def _not_written_again(step: np.ndarray, *, is_repeated: bool) -> np.ndarray:
    """Which lines no later one takes the place of: one of the same step, or of an earlier one that
    a later attempt went on from. `is_repeated`: a step has several lines."""
    later = np.minimum.accumulate(step[::-1])[::-1][1:]
    kept = np.ones(len(step), bool)
    kept[:-1] = step[:-1] <= later if is_repeated else step[:-1] < later
    return kept


def _key(name: str, metric: str) -> str:
    return f"{name}/{metric}" if name else metric
