"""Losses of a ladder over the weights, with the fitted law: as text, and as PNG by Pillow."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from toolkit.commands import chart
from toolkit.commands.ladder.law import Law
from toolkit.commands.ladder.running import Finished
from toolkit.errors import ConfigError

_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = (900, 560), 80, 190, 50, 60
_POINTS = 200


def draw(law: Law, finished: Sequence[Finished]) -> str:
    """The law over the weights, as text, at the number of tokens per weight nearest to 20."""
    low, high = _range(finished)
    ratio = min(_ratios(finished), key=lambda ratio: abs(math.log(ratio / 20)))
    xs = [low + (high - low) * k / _POINTS for k in range(_POINTS + 1)]
    losses = [law.loss(10**x, ratio * 10**x) for x in xs]
    axis = f"{10**low:.3g}", f"{10**high:.3g} weights"
    return chart.text(f"loss at {ratio:.0f} tokens per weight", xs, losses, axis=axis)


def write_png(path: Path, law: Law, finished: Sequence[Finished], *, title: str) -> None:
    """Points of the runs and lines of the law, both axes logarithmic.

    Raises:
        ConfigError: Pillow is not installed, or the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        problem = 'an image needs Pillow; install it with: pip install "toolkit[plot]"'
        raise ConfigError(problem, key="--plot") from None
    image = Image.new("RGB", _SIZE, "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    low, high = _range(finished)
    ratios = _ratios(finished)
    ends = [law.loss(10**x, ratio * 10**x) for x in (low, high) for ratio in ratios]
    losses = [*ends, *(run.loss for run in finished)]
    bottom, top = math.log10(min(losses)) - 0.01, math.log10(max(losses)) + 0.01
    width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM

    def place(size: float, loss: float) -> tuple[float, float]:
        x = (math.log10(size) - low) / (high - low)
        y = (top - math.log10(loss)) / (top - bottom)
        return _LEFT + width * x, _TOP + height * y

    canvas.text((_LEFT, 14), title, "black", ImageFont.load_default(15))
    for value in chart.ticks(10**bottom, 10**top):
        if 10**bottom <= value <= 10**top:
            y = place(10**low, value)[1]
            canvas.line([(_LEFT, y), (_LEFT + width, y)], "#dddddd")
            canvas.text((_LEFT - 10, y), f"{value:.4g}", "#444444", font, anchor="rm")
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if 10**low <= value <= 10**high:
                x = place(value, 10**bottom)[0]
                canvas.line([(x, _TOP), (x, _TOP + height)], "#eeeeee")
                below = x, _TOP + height + 8
                canvas.text(below, f"{value:.0e}".replace("e+0", "e"), "#444444", font, anchor="ma")
    canvas.text((_LEFT + width / 2, _SIZE[1] - 24), "weights", "black", font, anchor="ma")
    for number, ratio in enumerate(ratios):
        color = _COLORS[number % len(_COLORS)]
        xs = [10 ** (low + (high - low) * k / _POINTS) for k in range(_POINTS + 1)]
        canvas.line([place(x, law.loss(x, ratio * x)) for x in xs], color, width=2, joint="curve")
        canvas.text(
            (_LEFT + width + 12, _TOP + 20 * number), f"{ratio:.0f} tokens/weight", color, font
        )
    for run in finished:
        color = _COLORS[ratios.index(_ratio(run)) % len(_COLORS)]
        x, y = place(run.rung.size, run.loss)
        canvas.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color, outline="black")
    found = io.BytesIO()
    image.save(found, "PNG")
    try:
        path.write_bytes(found.getvalue())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}", key="--plot") from None


def _ratio(run: Finished) -> float:
    return float(run.rung.name.rpartition("-")[2])


def _ratios(finished: Sequence[Finished]) -> list[float]:
    return sorted({_ratio(run) for run in finished})


def _range(finished: Sequence[Finished]) -> tuple[float, float]:
    """Decimal logarithms of weights, a little beyond the smallest and the largest."""
    logs = [math.log10(run.rung.size) for run in finished]
    return min(logs) - 0.1, max(logs) + 0.1
