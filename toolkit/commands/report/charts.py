"""Which curves of runs a report draws, down-sampled to a size that a page can hold."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from toolkit.metrics.history import History, Series, down_sampled

_MOST_POINTS = 2_000
"""Of a curve; a screen shows no more."""
_ALL_POINTS = 36_000
"""Of all curves: a point is about 35 bytes in the file."""
_LEAST_POINTS = 24
_MOST_CURVES = 40
"""In a chart, as of a model of many layers: evenly chosen ones beyond."""
_FEW = 20
"""Points of a curve: fewer are marked, and never smoothed."""
_MOST_CHARTS = 40
"""In a section, the first ones: a browser keeps the picture of each."""

_SCHEDULED = ("weight_decay", "betas.", "global_batch_size", "sequence_length")
_LOSSES = ("z_loss", "load_balancing_loss", "router_z_loss", "expert_load_max")
_WORDS = {
    "loss": "Loss (nats per target)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "skipped": "Skipped steps",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOP/s utilization (fraction of the peak)",
    "data_loading_pct": "Waiting for data (% of a step)",
    "peak_memory_gb": "Peak memory (GB)",
    "bits_per_byte": "Bits per byte",
    "ppl": "Perplexity",
}
_THROUGHPUT = ("tokens_per_second", "mfu", "data_loading_pct", "peak_memory_gb", "compute_ratio")
_SMOOTHED = ("loss", *_LOSSES, "grad_norm", "tokens_per_second", "mfu")
_NOT_DRAWN = ("num_targets", "seconds", "ppl")
_ELSEWHERE = (
    *("loss", "lr", "grad_norm", "skipped", "instances/", "epoch", "attempt", "ppl"),
    *_LOSSES, *_SCHEDULED, *_THROUGHPUT,
)  # fmt: skip
"""How those metrics of training begin that stand in a section of their own, or in none."""


class Axes(msgspec.Struct, frozen=True):
    """A place on each axis."""

    step: int
    tokens: int | None
    time: float | None
    """Unix seconds."""

    @classmethod
    def at(cls, series: Series, place: int) -> "Axes":
        """Where one line of a metric lies."""
        tokens, when = int(series.tokens[place]), float(series.time[place])
        return cls(int(series.step[place]), tokens if tokens >= 0 else None, when)


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a chart."""

    run: int
    """Number of the run, from 0."""
    label: str
    """Beside other curves of the run; may be empty."""
    points: Series
    """Recorded values; of a long run the least and greatest of each span."""
    means: Series | None
    """Of a long run, the mean of each span, which is what smoothing starts from."""
    is_exact: bool = False
    """Never smoothed: all but losses, norms of gradients and speeds; and curves of few points."""
    dash: int = 0
    """0: a line; else the pattern of an evaluation, which has the colour of its run."""

    @property
    def is_few(self) -> bool:
        """Whether its points are marked."""
        return len(self.points.step) < _FEW


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Curves on common axes."""

    title: str
    is_log: bool = False
    curves: list[Curve]

    @property
    def is_by_run(self) -> bool:
        """Whether the colour of a curve is that of its run; else each has its own."""
        runs = {curve.run for curve in self.curves}
        return len(runs) == len(self.curves) or any(curve.dash for curve in self.curves)


class _Wanted(msgspec.Struct, frozen=True):
    """A chart before its curves are cut."""

    section: str
    title: str
    curves: list[tuple[int, str, Series]]
    is_log: bool = False
    is_smooth: bool = False


def charts_of(
    names: Sequence[str], histories: Sequence[History]
) -> tuple[dict[str, list[Chart]], dict[str, int]]:
    """The charts of each section, and how many more a section would have; `names` are those of the
    runs."""
    whole = [_with_axes(history) for history in histories]
    wanted: list[_Wanted] = []
    number_of: Counter[str] = Counter()
    for chart in _wanted(names, whole):
        if chart.curves:
            number_of[chart.section] += 1
            if number_of[chart.section] <= _MOST_CHARTS:
                wanted.append(chart)
    number = sum(min(len(chart.curves), _MOST_CURVES) for chart in wanted)
    points = max(_LEAST_POINTS, min(_MOST_POINTS, _ALL_POINTS // max(1, number)))
    evaluations = {id(series) for history in whole for series in history.eval.values()}
    found: dict[str, list[Chart]] = {}
    for chart in wanted:
        curves, sets = [], list[str]()
        for curve in _some(chart.curves):
            is_eval, dash = id(curve[2]) in evaluations, 0
            if is_eval and chart.section == "loss":
                sets += [curve[1]] if curve[1] not in sets else []
                dash = 1 + sets.index(curve[1])
            is_exact = is_eval or not chart.is_smooth
            curves.append(_curve(*curve, points, is_exact=is_exact, dash=dash))
        drawn = Chart(title=chart.title, is_log=chart.is_log, curves=curves)
        found.setdefault(chart.section, []).append(drawn)
    more = {name: n - _MOST_CHARTS for name, n in number_of.items() if n > _MOST_CHARTS}
    return found, more


def _wanted(names: Sequence[str], histories: Sequence[History]) -> Iterable[_Wanted]:
    train = [history.train for history in histories]
    losses = [
        (run, "train", series["loss"]) for run, series in enumerate(train) if "loss" in series
    ]
    for run, history in enumerate(histories):
        losses += [
            (run, name.removesuffix("/loss"), series)
            for name, series in history.eval.items()
            if name.endswith("/loss")
        ]
    yield _Wanted("loss", _WORDS["loss"], losses, is_smooth=True)
    recorded = list(dict.fromkeys(name for series in train for name in series))

    def each(section: str, chosen: Iterable[str]) -> Iterable[_Wanted]:
        for name in chosen:
            curves = [(run, "", series[name]) for run, series in enumerate(train) if name in series]
            is_smooth = name in _SMOOTHED
            yield _Wanted(section, _WORDS.get(name, name), curves, is_smooth=is_smooth)

    yield from each("loss", _LOSSES)
    yield from each("lr", ["lr", *(name for name in recorded if name.startswith(_SCHEDULED))])
    yield from each("norms", ["grad_norm", "loss_scale"])
    if any(series["skipped"].value.any() for series in train if "skipped" in series):
        yield from each("norms", ["skipped"])
    yield from _norms(names, histories)
    yield from each("throughput", _THROUGHPUT)
    yield from _evaluations(histories)
    yield from _data(names, histories)
    yield from _system(histories)
    yield from each("other", (name for name in recorded if not name.startswith(_ELSEWHERE)))


def _norms(names: Sequence[str], histories: Sequence[History]) -> Iterable[_Wanted]:
    """A chart of all layers for each run; of several runs, first the totals together."""
    kinds = dict.fromkeys(n.partition("/")[0] for history in histories for n in history.network)
    for kind in kinds:
        is_smooth = kind in _SMOOTHED
        totals = [
            (run, "", series)
            for run, history in enumerate(histories)
            if (series := history.network.get(f"{kind}/total")) is not None
        ]
        if len(histories) > 1:
            yield _Wanted("norms", f"{kind}, whole model", totals, is_smooth=is_smooth)
        for run, (name, history) in enumerate(zip(names, histories, strict=True)):
            layers = [
                (run, metric.partition("/")[2] or metric, series)
                for metric, series in history.network.items()
                if metric.partition("/")[0] == kind
            ]
            title = f"{kind} by layer" + (f": {name}" if len(names) > 1 else "")
            yield _Wanted("norms", title, layers, is_log=True, is_smooth=is_smooth)


def _evaluations(histories: Sequence[History]) -> Iterable[_Wanted]:
    """A chart for each metric but the loss, which stands beside that of training."""
    metrics = dict.fromkeys(n.rpartition("/")[2] for history in histories for n in history.eval)
    for metric in metrics:
        if metric == "loss" or metric in _NOT_DRAWN:
            continue
        curves = [
            (run, name.rpartition("/")[0], series)
            for run, history in enumerate(histories)
            for name, series in history.eval.items()
            if name.rpartition("/")[2] == metric
        ]
        yield _Wanted("evals", _WORDS.get(metric, metric), curves)


def _data(names: Sequence[str], histories: Sequence[History]) -> Iterable[_Wanted]:
    """Shares of the sources in the rows so far."""
    for run, (name, history) in enumerate(zip(names, histories, strict=True)):
        rows = {
            metric.partition("/")[2]: series
            for metric, series in history.train.items()
            if metric.startswith("instances/")
        }
        if not rows or len({len(series.step) for series in rows.values()}) > 1:
            continue
        total = np.sum([series.value for series in rows.values()], axis=0)
        with np.errstate(all="ignore"):
            shares = [
                (run, source, series._replace(value=series.value / total))
                for source, series in rows.items()
            ]
        title = "Share of the rows so far" + (f": {name}" if len(names) > 1 else "")
        yield _Wanted("data", title, shares)


def _system(histories: Sequence[History]) -> Iterable[_Wanted]:
    """GPUs of a run share a chart."""
    kinds: dict[str, list[tuple[int, str, Series]]] = {}
    for run, history in enumerate(histories):
        for name, series in history.system.items():
            gpu, _, kind = name.partition("_")
            is_gpu = gpu.startswith("gpu") and gpu[3:].isdigit()
            kinds.setdefault(f"gpu_{kind}" if is_gpu else name, []).append(
                (run, gpu if is_gpu else "", series)
            )
    for kind, curves in kinds.items():
        yield _Wanted("system", kind, curves)


def _with_axes(history: History) -> History:
    """With tokens for lines that do not tell, by the steps of training."""
    known = history.train.get("loss")
    if known is None or not len(known.step) or known.tokens.min() < 0:
        return history

    def told(series: Series) -> Series:
        if not len(series.step) or series.tokens.min() >= 0:
            return series
        tokens = np.interp(series.step, known.step, known.tokens).astype(np.int64)
        return series._replace(tokens=np.where(series.tokens < 0, tokens, series.tokens))

    return History(*({name: told(s) for name, s in stream.items()} for stream in history))


def _some(curves: list[tuple[int, str, Series]]) -> list[tuple[int, str, Series]]:
    if len(curves) <= _MOST_CURVES:
        return curves
    places = np.unique(np.linspace(0, len(curves) - 1, _MOST_CURVES).astype(int))
    return [curves[place] for place in places]


def _curve(
    run: int, label: str, series: Series, points: int, *, is_exact: bool, dash: int
) -> Curve:
    """Three fifths of the points for the extremes, the rest for the means."""
    if len(series.step) <= points or is_exact:
        cut = down_sampled(series, points)
        is_exact |= len(series.step) < _FEW
        return Curve(run=run, label=label, points=cut, means=None, is_exact=is_exact, dash=dash)
    few = max(8, points * 3 // 5)
    return Curve(
        run=run,
        label=label,
        points=down_sampled(series, few),
        means=_means(series, max(8, points - few)),
    )


def _means(series: Series, spans: int) -> Series:
    edges = np.linspace(0, len(series.step), spans + 1).astype(np.int64)
    middles, values = [], []
    for begin, end in itertools.pairwise(edges):
        part = series.value[begin:end]
        known = part[np.isfinite(part)]
        middles.append((begin + end - 1) // 2)
        values.append(known.mean() if len(known) else np.nan)
    place = np.array(middles, np.int64)
    return Series(series.step[place], series.tokens[place], series.time[place], np.array(values))
