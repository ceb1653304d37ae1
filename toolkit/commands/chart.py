"""Line charts: as text of braille dots, and as PNG by Pillow."""

import io
from collections.abc import Iterator, Mapping, Sequence

from toolkit.errors import ConfigError

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column of the dot (Unicode, block U+2800)."""
_ROWS = 8
"""Lines of text of a chart."""
_PANEL, _WIDTH = 240, 900
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 30, 40, 40
"""Pixels of an image: of each panel, and around it."""


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


def png(xs: Sequence[float], curves: Mapping[str, Sequence[float]], *, axis: str) -> bytes:
    """A panel for each of `curves` over `xs`. Raises ConfigError: Pillow is not installed."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        problem = 'an image needs Pillow; install it with: pip install "toolkit[plot]"'
        raise ConfigError(problem, key="--out") from None
    image = Image.new("RGB", (_WIDTH, _PANEL * len(curves)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    width, height = _WIDTH - _LEFT - _RIGHT, _PANEL - _TOP - _BOTTOM
    for number, (name, ys) in enumerate(curves.items()):
        top = number * _PANEL + _TOP
        low, high = min(ys), max(ys)
        draw.text((_LEFT, top - 26), name, "black", font)
        for part in range(5):
            y = top + height - height * part / 4
            draw.line([(_LEFT, y), (_LEFT + width, y)], "#dddddd")
            value = shown(low + (high - low) * part / 4)
            draw.text((_LEFT - 10, y), value, "#444444", font, anchor="rm")
            x = _LEFT + width * part / 4
            draw.line([(x, top), (x, top + height)], "#eeeeee")
            place = f"{xs[0] + (xs[-1] - xs[0]) * part / 4:,.0f}"
            words = f"{axis} {place}" if part == 0 else place
            draw.text((x, top + height + 8), words, "#444444", font, anchor="ma")
        points = [(_LEFT + width * x, top + height * (1.0 - y)) for x, y in _scaled(xs, ys)]
        draw.line(points, "#1f77b4", width=2, joint="curve")
    found = io.BytesIO()
    image.save(found, "PNG")
    return found.getvalue()


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
