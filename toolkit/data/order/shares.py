"""Shares that are exact at every prefix, for any ratios, at any position, with nothing stored.

Position t of a mixture gives one instance. Source i with share p_i (all shares add up to 1) shall
have given c_i(t) of the first t instances, with |c_i(t) - p_i t| < 1 for every i and t: the
chairman assignment problem (Tijdeman 1980). Unit j of source i (from 1) keeps that bound if and
only if it stands in the window of positions

    [release, deadline) = [floor((j - 1) / p_i), ceil(j / p_i)),

and taking the released unit of the earliest deadline at every position ("EDF") finds an order that
keeps all windows (P-fair scheduling: Baruah, Cohen, Plaxton & Varvel 1996). EDF has to begin at the
first position, though. What follows makes position 1e9 as cheap as position 0.

Blocks. Positions are cut into blocks of B >= 1 / min p_i. If the counts at both ends of a block are
given, EDF over the block's units, their windows cut at its ends, finds an order whenever there is
one. By Hall's theorem for intervals there is one if no interval [a, b) of positions is the whole
window of more than b - a units. With S <= a < b <= T for a block [S, T):

    S < a, b < T   sum_i max(0, floor(p_i b) - ceil(p_i a)) <= sum_i p_i (b - a) = b - a: always.
    a = S, b = T   sum_i c_i(T) - c_i(S) = T - S; no term is negative, because p_i (T - S) >= 1.
    a = S, b < T   asks of the counts at S: what is not yet given can be given in time.
    a > S, b = T   asks of the counts at T: what is given already had the room before T.

Not every rounding of p_i T has the last two properties. Neither has the one to the largest
remainders: with remainders .64 .64 .60 .56 .56 (three are rounded up) and shares of .44 for the
last two, both have their deadline at the very next position.

Counts at the ends. The counts at T are those that EDF reaches at T when it begins at
T - W, W = max_i ceil(1 / p_i), or at 0, from counts with the first property alone. Those are easy
to find: of the units whose windows hold positions on both sides of T - W, as many as must be are
taken as given, in the order of their deadlines. (Some choice has the property, for EDF from
position 0 passes here. Exchanging a chosen unit for one of an earlier deadline keeps it.) Then EDF
meets all deadlines from T - W on, so at T the first property holds again. The second holds for
a >= T - W because EDF has put those units there, and for a < T - W because every source has a whole
unit in W positions, so that the sum is T - sum_i ceil(p_i a) <= T - a.

All floors and ceilings are of integers, without rounding: p_i = numerators[i] / denominator.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
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
    """The order of one block."""

    sources: np.ndarray
    """Source of each position; int32, shape `(block_size,)`."""
    ordinals: np.ndarray
    """How many instances of that source the block has before; int32, same shape."""
    counts: np.ndarray
    """Instances of each source before the block; int64, shape `(num_sources,)`."""
    given: np.ndarray
    """Instances of each source in the block before every `COUNTED_EVERY`-th position; int32,
    shape `(block_size / COUNTED_EVERY, num_sources)`."""


class Shares:
    """Which source each position of a mixture is from.

    Attributes:
        num_sources: sources are numbered from 0 in the order of their ratios.
        block_size: time and memory of an access are bounded by this many positions.
    """

    def __init__(self, ratios: Sequence[Fraction | int]) -> None:
        """`ratios` are not negative, and not all 0; a source of ratio 0 never comes.

        Raises:
            ValueError: a share is too small to be kept in bounded memory.
        """
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
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(positions)]
        for first, end in itertools.pairwise(cuts):
            if first == end:
                continue
            block, inside = self._block(int(numbers[first])), places[first:end]
            sources[first:end] = block.sources[inside]
            ordinals[first:end] = block.counts[sources[first:end]] + block.ordinals[inside]
        return sources, ordinals

    def counts(self, position: int) -> np.ndarray:
        """Instances of each source before `position`; int64, shape `(num_sources,)`."""
        number, place = divmod(position, self.block_size)
        if not place:
            return self._scatter(self._start(number))
        block = self._block(number)
        kept = place // COUNTED_EVERY
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
        return _Block(sources, ordinals, self._scatter(before), self._given(sources))

    def _given(self, sources: np.ndarray) -> np.ndarray:
        pieces = np.arange(len(sources)) // COUNTED_EVERY
        num_pieces = int(pieces[-1]) + 1
        cells = np.bincount(
            pieces * self.num_sources + sources, minlength=num_pieces * self.num_sources
        )
        each = cells.astype(np.int32).reshape(num_pieces, self.num_sources)
        return np.cumsum(each, axis=0, dtype=np.int32) - each

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
        """The (active) source of each position of [first, end), earliest deadline first.

        Args:
            before: counts at `first`.
            after: counts at `end`, where they are given.
        """
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
        push, pop, taken = heapq.heappush, heapq.heappop, 0
        for available in released:
            while taken < available:
                push(ready, waiting[taken])
                taken += 1
            chosen.append(pop(ready))
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
