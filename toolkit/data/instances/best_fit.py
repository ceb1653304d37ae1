"""Best-fit-decreasing bin packing of pieces that are known by their lengths alone.

Best fit decreasing takes pieces from the longest to the shortest and puts each into the row with
the least room that still holds it, or into a new row. With lengths up to `sequence_length`, pieces
of one length, and rows of one history, are alike, so whole groups of them are placed at once (as in
Ding et al. 2024, "Fewer Truncations Improve Language Modeling", which does it piece by piece with a
segment tree): the work depends on the number of different lengths, not on the number of pieces,
and so do the results, `Placement` and `RowGroup`.
"""

import bisect
from collections import deque
from typing import NamedTuple

import numpy as np

Runs = tuple["Runs", int, int] | None
"""Pieces of a row so far: (what was before, length, how many of it)."""


class Placement(NamedTuple):
    """The next `num_rows * pieces_per_row` pieces of `length`, in rows that follow each other.

    Placements are listed from the greatest length to the smallest; all of a length stand together.
    """

    length: int
    first_row: int
    num_rows: int
    pieces_per_row: int
    pieces_before: int
    """Pieces that each of these rows held before."""


class RowGroup(NamedTuple):
    """Rows [first_row, first_row + num_rows), which hold pieces of the same lengths."""

    first_row: int
    num_rows: int
    num_pieces: int
    """Pieces in each of them."""
    runs: Runs

    def lengths(self) -> np.ndarray:
        """Lengths of the pieces of each row, in order: int64, `(num_pieces,)`."""
        found, runs = [], self.runs
        while runs is not None:
            runs, length, count = runs
            found.append((length, count))
        found.reverse()
        lengths, counts = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return np.repeat(lengths, counts)


def best_fit_decreasing(
    counts: np.ndarray, sequence_length: int
) -> tuple[list[Placement], list[RowGroup]]:
    """Pack pieces into rows of `sequence_length` tokens.

    Args:
        counts: how many pieces there are of each length, `(sequence_length + 1,)`; none of 0.

    Returns:
        Where pieces go, and what rows hold in the end: all rows, in order.
    """
    packer = _Packer(sequence_length)
    for length in np.flatnonzero(counts)[::-1].tolist():
        packer.place(length, int(counts[length]))
    return packer.placements, packer.groups()


class _Packer:
    def __init__(self, sequence_length: int) -> None:
        self.placements: list[Placement] = []
        self._sequence_length = sequence_length
        self._num_rows = 0
        self._full: list[RowGroup] = []
        # Rows by their room, and the rooms there are, ascending. Of rows with the same room, the
        # one that has had it longest comes first; best fit leaves that open.
        self._by_room: dict[int, deque[RowGroup]] = {}
        self._rooms: list[int] = []

    def place(self, length: int, count: int) -> None:
        while count:
            position = bisect.bisect_left(self._rooms, length)
            if position < len(self._rooms):
                count -= self._fill(self._rooms[position], length, count)
            else:
                self._open(length, count)
                count = 0

    def groups(self) -> list[RowGroup]:
        left = [group for groups in self._by_room.values() for group in groups]
        return sorted([*self._full, *left], key=lambda group: group.first_row)

    def _open(self, length: int, count: int) -> None:
        """New rows for all pieces."""
        per_row = self._sequence_length // length
        for num_rows, pieces in ((count // per_row, per_row), (1, count % per_row)):
            if num_rows and pieces:
                group = RowGroup(self._num_rows, num_rows, 0, None)
                self._num_rows += num_rows
                self._put(group, self._sequence_length, length, pieces)

    def _fill(self, room: int, length: int, count: int) -> int:
        """Place pieces into rows of `room`; returns how many. A row that took one and still fits
        another has now the least room of all that do, so it takes as many as it can."""
        groups, per_row, left = self._by_room[room], room // length, count
        while groups and left:
            group = groups.popleft()
            # The last row may be given fewer than fit.
            num_rows, pieces = min(group.num_rows, left // per_row), per_row
            if num_rows == 0:
                num_rows, pieces = 1, left
            if num_rows < group.num_rows:
                rest = group._replace(
                    first_row=group.first_row + num_rows, num_rows=group.num_rows - num_rows
                )
                groups.appendleft(rest)
            self._put(group._replace(num_rows=num_rows), room, length, pieces)
            left -= num_rows * pieces
        if not groups:
            del self._by_room[room]
            del self._rooms[bisect.bisect_left(self._rooms, room)]
        return count - left

    def _put(self, group: RowGroup, room: int, length: int, pieces: int) -> None:
        self.placements.append(
            Placement(length, group.first_row, group.num_rows, pieces, group.num_pieces)
        )
        group = group._replace(
            num_pieces=group.num_pieces + pieces, runs=(group.runs, length, pieces)
        )
        room -= length * pieces
        if room == 0:
            self._full.append(group)
            return
        if room not in self._by_room:
            self._by_room[room] = deque()
            bisect.insort(self._rooms, room)
        self._by_room[room].append(group)
