"""Shares that change at given positions."""

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from toolkit.data.order.shares import Shares


class ScheduledShares:
    """Like `Shares`, for ratios that change on the way.

    In each segment shares are counted from its first position: at every prefix of a segment, every
    source has had its exact share of the segment to within one instance.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[Fraction]]]) -> None:
        """`segments` are (first position, ratios of all sources); the first begins at 0."""
        self.starts = np.array([start for start, _ in segments], dtype=np.int64)
        self._segments = [Shares(ratios) for _, ratios in segments]
        self._before = functools.lru_cache(None)(self._count_before)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Shares.locate`."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        found = []
        for number in np.unique(numbers).tolist():
            inside = positions[numbers == number] - self.starts[number]
            sources, ordinals = self._segments[number].locate(inside)
            found.append((sources, ordinals + self._before(number)[sources]))
        if len(found) == 1:
            return found[0]
        empty = np.empty(0, dtype=np.int64)
        sources = np.concatenate([empty, *(part for part, _ in found)])
        return sources, np.concatenate([empty, *(part for _, part in found)])

    def counts(self, position: int) -> np.ndarray:
        """See `Shares.counts`."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        inside = position - int(self.starts[number])
        return self._before(number) + self._segments[number].counts(inside)

    def _count_before(self, number: int) -> np.ndarray:
        """Instances of each source before segment `number`."""
        if number == 0:
            return np.zeros(self._segments[0].num_sources, dtype=np.int64)
        length = int(self.starts[number] - self.starts[number - 1])
        return self._before(number - 1) + self._segments[number - 1].counts(length)
