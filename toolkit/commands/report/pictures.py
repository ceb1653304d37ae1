"""The charts of a report as PNGs, drawn by Pillow, as those of a ladder are.

A page has its own script; what remains is lines on axes, and for those Pillow is there already.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.commands import chart as charts
from toolkit.commands.report.charts import Chart
from toolkit.commands.report.page import COLORS
from toolkit.commands.report.reading import Report
from toolkit.errors import ConfigError
from toolkit.metrics.history import Series
from toolkit.storage.atomic import write_atomic
from toolkit.wording import visible

_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = (1000, 560), 90, 210, 46, 56
_MOST_NAMES = 24
_LARGEST = 1e300
"""Values are below: their differences are numbers too."""


def write_pngs(report: Report, folder: Path, *, axis: str = "step") -> list[Path]:
    """A picture of each chart in `folder`, by section and title; `axis`: step, tokens or time.

    Raises:
        ConfigError: Pillow is not installed, or a file cannot be written.
    """
    charts.check_pillow("--png")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for section, drawn in report.charts.items():
            for chart in drawn:
                name = re.sub(r"[^A-Za-z0-9._]+", "-", f"{section} {chart.title}").strip("-")
                path = folder / f"{name[:100]}.png"
                if path in written:
                    path = folder / f"{name[:100]}-{len(written)}.png"
                write_atomic(path, _png(report, chart, axis), sync=False)
                written.append(path)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}", key="--png") from None
    return written


def _png(report: Report, chart: Chart, axis: str) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", _SIZE, "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    canvas.text((_LEFT, 14), visible(chart.title), "black", ImageFont.load_default(16))
    curves = [
        (curve, *_known(curve.points, axis, is_log=chart.is_log), curve.means)
        for curve in chart.curves
    ]
    seen = [(xs, ys) for _, xs, ys, _ in curves if len(xs)]
    if not seen:
        canvas.text((_LEFT, _SIZE[1] / 2), "no values", "#444444", font)
        return _bytes(image)
    since: dict[int, float] = {}  # of each run, where its axis of time begins
    for curve, xs, _, _ in curves:
        if len(xs):
            first = float(xs.min()) if axis == "time" else 0.0
            since[curve.run] = min(first, since.get(curve.run, first))
    left = min(float(xs.min()) - since[c.run] for c, xs, _, _ in curves if len(xs))
    right = max(float(xs.max()) - since[c.run] for c, xs, _, _ in curves if len(xs))
    every = np.concatenate([ys for _, ys in seen])
    low, high = float(every.min()), float(every.max())
    usual = float(np.quantile(every, 0.98))
    if len(every) > 50 and high - low > 2.5 * (usual - low) > 0:
        # The first steps would leave the rest flat.
        most, high = high, usual + 0.3 * (usual - low)
        text = f"cut off above; the greatest is {10**most if chart.is_log else most:.5g}"
        canvas.text((_SIZE[0] - _RIGHT, 18), text, "#444444", font, anchor="ra")
    if high == low:
        low, high = low - (abs(low) * 0.05 or 1), high + (abs(high) * 0.05 or 1)
    width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = min(1.0, max(0.0, (y - low) / (high - low)))
        return _LEFT + width * across, _TOP + height * (1 - up)

    for tick in charts.ticks(low, high):
        if low <= tick <= high:
            y = place(left, tick)[1]
            canvas.line([(_LEFT, y), (_LEFT + width, y)], "#dddddd")
            text = f"{10**tick:.3g}" if chart.is_log else f"{tick:.5g}"
            canvas.text((_LEFT - 8, y), text, "#444444", font, anchor="rm")
    for tick in charts.ticks(left, right):
        if left <= tick <= right:
            below = place(tick, low)[0], _TOP + height + 8
            canvas.text(below, f"{tick:,.6g}", "#444444", font, anchor="ma")
    words = {"step": "steps", "tokens": "tokens", "time": "seconds"}[axis]
    canvas.text((_LEFT + width / 2, _SIZE[1] - 24), words, "black", font, anchor="ma")
    for number, (curve, xs, ys, means) in enumerate(curves):
        color = COLORS[(curve.run if chart.is_by_run else number) % len(COLORS)]
        if means is not None:
            _line(canvas, place, xs - since.get(curve.run, 0.0), ys, _pale(color))
            xs, ys = _known(means, axis, is_log=chart.is_log)
        across = xs - since.get(curve.run, 0.0)
        _line(canvas, place, across, ys, _pale(color) if curve.dash else color)
        if curve.dash or curve.is_few or len(xs) == 1:
            _dots(canvas, place, across, ys, color)
        if number < _MOST_NAMES:
            name = _name(report, curve.run, curve.label)
            canvas.text((_LEFT + width + 10, _TOP + 18 * number), name[:28], color, font)
    return _bytes(image)


def _name(report: Report, run: int, label: str) -> str:
    title = report.runs[run].title
    return visible(f"{title} {label}".strip() if len(report.runs) > 1 else label or title)


def _known(series: Series, axis: str, *, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    xs = getattr(series, axis).astype(np.float64)
    ok = (np.abs(series.value) < _LARGEST) & np.isfinite(xs) & (xs >= 0)
    if is_log:
        ok &= series.value > 0
        return xs[ok], np.log10(series.value[ok])
    return xs[ok], series.value[ok]


def _line(canvas: Any, place: Any, xs: np.ndarray, ys: np.ndarray, color: str) -> None:
    points = list(_places(place, xs, ys))
    if len(points) > 1:
        canvas.line(points, color, width=2, joint="curve")


def _dots(canvas: Any, place: Any, xs: np.ndarray, ys: np.ndarray, color: str) -> None:
    for x, y in _places(place, xs, ys):
        canvas.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)


def _places(place: Any, xs: np.ndarray, ys: np.ndarray) -> Iterator[tuple[float, float]]:
    for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
        yield place(x, y)


def _pale(color: str) -> str:
    parts = (int(color[n : n + 2], 16) for n in (1, 3, 5))
    return "#" + "".join(f"{255 - (255 - part) // 4:02x}" for part in parts)


def _bytes(image: Any) -> bytes:
    found = io.BytesIO()
    image.save(found, "PNG")
    return found.getvalue()
