"""Shares that are exact at every prefix, for any ratios, at any position, with nothing stored.

Position t of a mixture gives one instance. Source i with share p_i (all shares add up to 1) shall
have given c_i(t) of the first t instances, with |c_i(t) - p_i t| < 1 for every i and t: the
chairman assignment problem (Tijdeman 1980). Unit j of source i (from 1) keeps that bound if and
only if it stands in the window of positions

    [release, deadline) = [floor((j - 1) / p_i), ceil(j / p_i)),

and taking the released unit of the earliest deadline at every position ("EDF") finds an order that
keeps all windows (P-fair scheduling: Baruah, Cohen, Plaxton & Varvel 1996). EDF has to begin at the
first position, though. What follows makes position 1e9 as cheap as position 0.

Blocks. Positions are cut into blocks of B >= 1 / min p_i. The counts at the end T of a block are
those that EDF reaches when it begins at T - W, W = max_i ceil(1 / p_i), from counts at which all
deadlines can still be met. Given the counts at both ends, EDF over a block's units, their windows
cut at its ends, finds its order. docs/mixture_order.md proves that it always does.

All floors and ceilings are of integers, without rounding: p_i = numerators[i] / denominator.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

MIN_BLOCK = 1024
MIN_BLOCK_PER_SOURCE = 64
MAX_BLOCK = 1_000_000
"""Limits the time and memory of a block (0.7 s, 140 MB), and so the smallest share to 1e-6."""
COUNTED_EVERY = 1024
"""Positions of a block between two counts that are kept: training asks for counts at every step."""
NUM_BLOCKS_KEPT = 4
_INT64_ROOM = 1 << 62


class _Block(NamedTuple):
    sources: np.ndarray
    """Source of each position; int32, `(block_size,)`."""
    ordinals: np.ndarray
    """How many instances of that source the block has before; int32, `(block_size,)`."""
    counts: np.ndarray
    """Instances of each source before the block; int64, `(num_sources,)`."""
    given: np.ndarray
    """Instances of each source in the block before every `COUNTED_EVERY`-th position; int32,
    `(block_size / COUNTED_EVERY, num_sources)`."""


class Shares:
    """Which source each position of a mixture is from.

    Attributes:
        num_sources: sources are numbered from 0 in the order of their ratios.
        block_size: time and memory of an access are bounded by this many positions.
    """

    def __init__(self, ratios: Sequence[Fraction | int]) -> None:
        """`ratios` are not negative, and not all 0; a source of ratio 0 never comes. ValueError:
        a share is too small to be kept in bounded memory."""
        total = Fraction(sum(ratios))
        shares = [Fraction(ratio) / total for ratio in ratios]
        self.num_sources = len(shares)
        self._active = [number for number, share in enumerate(shares) if share > 0]
        self._denominator = math.lcm(*(share.denominator for share in shares))
        self._numerators = [
            shares[number].numerator * (self._denominator // shares[number].denominator)
            for number in self._active
        ]
        self._warm_up = -(-self._denominator // min(self._numerators))
        if self._warm_up > MAX_BLOCK:
            raise ValueError(f"the smallest share is below 1 in {MAX_BLOCK}")
        self.block_size = max(MIN_BLOCK, MIN_BLOCK_PER_SOURCE * len(self._active), self._warm_up)
        # Both caches are safe to use from several threads.
        self._block = functools.lru_cache(NUM_BLOCKS_KEPT)(self._make_block)
        self._start = functools.lru_cache(2 * NUM_BLOCKS_KEPT)(self._make_start)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For ascending `positions`, shape `(count,)`: the source of each one, and how many
        instances of that source come before it; int64 of the same shape."""
        sources = np.empty(len(positions), dtype=np.int64)
        ordinals = np.empty(len(positions), dtype=np.int64)
        numbers, places = np.divmod(positions, self.block_size)
        for number, run in runs(numbers):
            block = self._block(number)
            sources[run] = block.sources[places[run]]
            ordinals[run] = block.counts[sources[run]] + block.ordinals[places[run]]
        return sources, ordinals

    def counts(self, position: int) -> np.ndarray:
        """Instances of each source before `position`; int64, shape `(num_sources,)`."""
        number, place = divmod(position, self.block_size)
        if not place:
            return self._scatter(self._start(number))
        block, kept = self._block(number), place // COUNTED_EVERY
        rest = block.sources[kept * COUNTED_EVERY : place]
        return block.counts + block.given[kept] + np.bincount(rest, minlength=self.num_sources)

    def _make_block(self, number: int) -> _Block:
        first = number * self.block_size
        before, after = self._start(number), self._start(number + 1)
        active = self._edf(before, first, first + self.block_size, after)
        by_source = np.argsort(active, kind="stable")
        num_each = np.bincount(active, minlength=len(before))
        ordinals = np.empty(self.block_size, dtype=np.int32)
        ordinals[by_source] = np.arange(self.block_size) - np.repeat(
            np.cumsum(num_each) - num_each, num_each
        )
        sources = np.array(self._active, dtype=np.int32)[active]
        parts = np.arange(self.block_size) // COUNTED_EVERY
        num_cells = (int(parts[-1]) + 1) * self.num_sources
        cells = np.bincount(parts * self.num_sources + sources, minlength=num_cells)
        each = cells.astype(np.int32).reshape(-1, self.num_sources)
        given = np.cumsum(each, axis=0, dtype=np.int32) - each
        return _Block(sources, ordinals, self._scatter(before), given)

    def _make_start(self, number: int) -> tuple[int, ...]:
        """Counts of the active sources where block `number` begins."""
        end = number * self.block_size
        first = max(0, end - self._warm_up)
        counts = self._urgent_counts(first)
        given = np.bincount(self._edf(counts, first, end), minlength=len(counts)).tolist()
        return tuple(count + more for count, more in zip(counts, given, strict=True))

    def _scatter(self, counts: tuple[int, ...]) -> np.ndarray:
        found = np.zeros(self.num_sources, dtype=np.int64)
        found[self._active] = counts
        return found

    def _urgent_counts(self, position: int) -> tuple[int, ...]:
        """Counts at `position` from which all deadlines can be met."""
        counts, straddling = [], []
        for source, numerator in enumerate(self._numerators):
            count, rest = divmod(position * numerator, self._denominator)
            counts.append(count)
            if rest:
                deadline = -(-(count + 1) * self._denominator // numerator)
                straddling.append((deadline, source))
        for _, source in sorted(straddling)[: position - sum(counts)]:
            counts[source] += 1
        return tuple(counts)

    def _edf(
        self, before: tuple[int, ...], first: int, end: int, after: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """The (active) source of each position of [first, end), earliest deadline first; `before`
        are the counts at `first`, `after` those at `end`, where they are given."""
        num_active = len(self._numerators)
        if after is None:
            last = [-(-end * numerator // self._denominator) for numerator in self._numerators]
        else:
            last = list(after)
        sources, release, deadline = self._windows(before, last, first)
        if after is not None:
            deadline = np.minimum(deadline, end - first)
        key = deadline * num_active + sources
        order = np.argsort(release, kind="stable")
        # What is released at or before each position, in one list in the order of release.
        released = np.searchsorted(release[order], np.arange(end - first), side="right").tolist()
        waiting = key[order].tolist()
        ready: list[int] = []
        chosen: list[int] = []
        push, pop, push_and_pop, taken = heapq.heappush, heapq.heappop, heapq.heappushpop, 0
        for available in released:
            if taken == available:
                chosen.append(pop(ready))
                continue
            while taken < available - 1:
                push(ready, waiting[taken])
                taken += 1
            chosen.append(push_and_pop(ready, waiting[taken]))
            taken += 1
        return np.array(chosen, dtype=np.int64) % num_active

    def _windows(
        self, before: Sequence[int], last: Sequence[int], first: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Units before + 1 ... last of every source: the source, the release and the deadline of
        each, counted from position `first`."""
        # Boundary u between two units is at u * denominator / numerator; counted from the first
        # one, in whole positions and in numerators, the numbers stay small.
        steps = [divmod(self._denominator, numerator) for numerator in self._numerators]
        bases = [
            divmod(count * self._denominator - first * numerator, numerator)
            for count, numerator in zip(before, self._numerators, strict=True)
        ]
        num_units = np.maximum(np.array(last) - np.array(before), 0)
        sources = np.repeat(np.arange(len(num_units)), num_units)
        units = np.arange(len(sources)) - np.repeat(np.cumsum(num_units) - num_units, num_units)
        fits = max(self._numerators) * (int(num_units.max()) + 2) < _INT64_ROOM
        small = np.int64 if fits else object
        numerators = np.array(self._numerators, dtype=small)[sources]
        step_rest = np.array([rest for _, rest in steps], dtype=small)[sources]
        rest = units.astype(small) * step_rest
        rest += np.array([rest for _, rest in bases], dtype=small)[sources]
        whole = units * np.array([whole for whole, _ in steps])[sources]
        whole += np.array([whole for whole, _ in bases])[sources]
        release = whole + (rest // numerators).astype(np.int64)
        whole += np.array([whole for whole, _ in steps])[sources]
        deadline = whole - (-(rest + step_rest) // numerators).astype(np.int64)
        return sources, release, deadline


class ScheduledShares:
    """Like `Shares`, for ratios that change on the way: each segment counts anew."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[Fraction]]]) -> None:
        """`segments` are (first position, ratios of all sources); the first begins at 0."""
        self.starts = np.array([start for start, _ in segments], dtype=np.int64)
        self._segments = [Shares(ratios) for _, ratios in segments]
        self._before = functools.lru_cache(None)(self._count_before)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources = np.empty(len(positions), dtype=np.int64)
        ordinals = np.empty(len(positions), dtype=np.int64)
        for number, run in runs(np.searchsorted(self.starts, positions, side="right") - 1):
            inside = positions[run] - self.starts[number]
            sources[run], ordinals[run] = self._segments[number].locate(inside)
            ordinals[run] += self._before(number)[sources[run]]
        return sources, ordinals

    def counts(self, position: int) -> np.ndarray:
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        inside = position - int(self.starts[number])
        return self._before(number) + self._segments[number].counts(inside)

    def _count_before(self, number: int) -> np.ndarray:
        """Instances of each source before segment `number`."""
        if number == 0:
            return np.zeros(self._segments[0].num_sources, dtype=np.int64)
        length = int(self.starts[number] - self.starts[number - 1])
        return self._before(number - 1) + self._segments[number - 1].counts(length)


def runs(values: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Runs of equal numbers in ascending `values`."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, end in itertools.pairwise(cuts):
        if first < end:
            yield int(values[first]), slice(first, end)
