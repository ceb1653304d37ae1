"""Line charts: as text of braille dots, and as PNG by Pillow."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence

from toolkit.errors import ConfigError

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column of the dot (Unicode, block U+2800)."""
_ROWS = 8
"""Lines of text of a chart."""
_PANEL, _WIDTH = 240, 900
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 30, 40, 40
"""Pixels of an image: of each panel, and around it."""
_TITLE = 30


def text(
    name: str, xs: Sequence[float], ys: Sequence[float], *, axis: tuple[str, str], width: int = 72
) -> str:
    """`ys` over `xs` (ascending) in `width` columns; `axis`: what is written below both ends."""
    low, high = min(ys), max(ys)
    if low == high:
        return f"{name}: {shown(low)} throughout"
    labels = [shown(high), *[""] * (_ROWS - 2), shown(low)]
    margin = max(map(len, labels))
    columns = max(10, width - margin - 2)
    cells = [[0] * columns for _ in range(_ROWS)]
    for x, y in _line(xs, ys, 2 * columns, 4 * _ROWS):
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    rows = ["".join(chr(0x2800 + bits) for bits in row) for row in cells]
    lines = [f"{label:>{margin}} ┤{row}" for label, row in zip(labels, rows, strict=True)]
    below = f"{axis[0]}{axis[1]:>{columns - len(axis[0])}}"
    return "\n".join([name, *lines, f"{'':>{margin}}  {below}"])


def png(
    xs: Sequence[float], curves: Mapping[str, Sequence[float]], *, axis: str, title: str = ""
) -> bytes:
    """A panel for each of `curves` over `xs`, from 0 on. Raises ConfigError: Pillow is not
    installed."""
    check_pillow("--out")
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (_WIDTH, _TITLE + _PANEL * len(curves)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((_LEFT, 12), title, "black", ImageFont.load_default(15))
    width, height = _WIDTH - _LEFT - _RIGHT, _PANEL - _TOP - _BOTTOM
    for number, (name, ys) in enumerate(curves.items()):
        top = _TITLE + number * _PANEL + _TOP
        marks = ticks(min(0.0, *ys), max(0.0, *ys))
        low, high = marks[0], marks[-1]
        draw.text((_LEFT, top - 26), name, "black", font)
        for value in marks:
            y = top + height * (high - value) / (high - low)
            draw.line([(_LEFT, y), (_LEFT + width, y)], "#dddddd")
            draw.text((_LEFT - 10, y), shown(value), "#444444", font, anchor="rm")
        span = (xs[-1] - xs[0]) or 1
        for place in (mark for mark in ticks(xs[0], xs[-1]) if xs[0] <= mark <= xs[-1]):
            x = _LEFT + width * (place - xs[0]) / span
            draw.line([(x, top), (x, top + height)], "#eeeeee")
            draw.text((x, top + height + 8), f"{place:,.10g}", "#444444", font, anchor="ma")
        draw.text((_LEFT - 10, top + height + 8), axis, "#444444", font, anchor="ra")
        points = [
            (_LEFT + width * (x - xs[0]) / span, top + height * (high - y) / (high - low))
            for x, y in zip(xs, ys, strict=True)
        ]
        draw.line(points, "#1f77b4", width=2, joint="curve")
    found = io.BytesIO()
    image.save(found, "PNG")
    return found.getvalue()


def check_pillow(key: str) -> None:
    """Raise ConfigError, about the option `key`, where Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        problem = 'an image needs Pillow; install it with: pip install "toolkit[plot]"'
        raise ConfigError(problem, key=key) from None


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, evenly spaced, around all between `low` and `high`."""
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    size = next(unit * part for part in (0.2, 0.25, 0.5, 1.0, 2.0) if span / (unit * part) <= 6)
    first, last = math.floor(low / size), math.ceil((low + span) / size - 1e-9)
    return [round(n * size, 12 - math.floor(math.log10(size))) for n in range(first, last + 1)]


def shown(value: float) -> str:
    """Four digits, whole numbers with all of theirs."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def _scaled(xs: Sequence[float], ys: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Points between 0 and 1; a constant lies in the middle."""
    low, high, first = min(ys), max(ys), xs[0]
    for x, y in zip(xs, ys, strict=True):
        across = (x - first) / ((xs[-1] - first) or 1)
        yield across, (y - low) / (high - low) if high > low else 0.5


def _line(
    xs: Sequence[float], ys: Sequence[float], columns: int, rows: int
) -> Iterator[tuple[int, int]]:
    """The dots (column, row from the top) of the line through all points."""
    before: tuple[int, int] | None = None
    for x, y in _scaled(xs, ys):
        point = round(x * (columns - 1)), round((1.0 - y) * (rows - 1))
        last = before or point
        across, down = point[0] - last[0], point[1] - last[1]
        number = max(abs(across), abs(down), 1)
        for n in range(number + 1):
            yield last[0] + round(across * n / number), last[1] + round(down * n / number)
        before = point
