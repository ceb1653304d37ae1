"""Several curves in one chart of letters, the same on a terminal and in a pipe."""

import string
from collections.abc import Mapping

import numpy as np

from toolkit.commands.chart import shown
from toolkit.metrics.history import Series

LETTERS = string.ascii_uppercase + string.ascii_lowercase
_ROWS = 14
_SEVERAL = "*"


def overlay(
    curves: Mapping[str, Series], *, axis: str = "step", width: int = 76, rows: int = _ROWS
) -> list[str]:
    """A chart of all `curves` (letter -> values over steps or tokens) on common axes.

    A column shows the mean of the values in it; where several curves meet is a `*`. What lies far
    above the rest, as the first steps of a run do, is drawn at the top.
    """
    known = {
        letter: (getattr(series, axis)[ok], series.value[ok])
        for letter, series in curves.items()
        if (ok := np.isfinite(series.value)).any()
    }
    if not known:
        return ["no values yet"]
    left = min(float(xs[0]) for xs, _ in known.values())
    right = max(float(xs[-1]) for xs, _ in known.values())
    low = min(float(ys.min()) for _, ys in known.values())
    high = max(float(ys.max()) for _, ys in known.values())
    # The first hundredth of a loss curve would leave the rest flat.
    usual = max(float(np.quantile(ys, 0.98)) for _, ys in known.values())
    is_cut = high - low > 1.5 * (usual - low) and usual > low
    top = usual if is_cut else high
    margin = max(len(shown(low)), len(shown(top)) + (1 if is_cut else 0))
    columns = max(10, width - margin - 2)
    grid = [[" "] * columns for _ in range(rows)]
    for letter, (xs, ys) in known.items():
        place = np.zeros(len(xs), np.int64)
        if right > left:
            place = np.round((xs - left) / (right - left) * (columns - 1)).astype(np.int64)
        sums, counts = (np.bincount(place, weights, columns) for weights in (ys, None))
        for column in np.flatnonzero(counts):
            value, row = sums[column] / counts[column], rows - 1
            if top > low:
                row = round((1 - min(1.0, (value - low) / (top - low))) * (rows - 1))
            cell = grid[row][column]
            grid[row][column] = letter if cell in (" ", letter) else _SEVERAL
    labels = [f"{'>' if is_cut else ''}{shown(top)}", *[""] * (rows - 2), shown(low)]
    lines = [
        f"{label:>{margin}} |{''.join(row).rstrip()}"
        for label, row in zip(labels, grid, strict=True)
    ]
    first, last = f"{axis} {left:,.0f}", f"{right:,.0f}"
    return [*lines, f"{'':>{margin}}  {first}{last:>{max(1, columns - len(first))}}"]
