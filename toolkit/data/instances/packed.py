"""Rows of whole documents, as many as fit: best-fit-decreasing packing. Documents that form units
stay together: where this speaks of a document, it is a unit then, and none is cut.

How a document gets into a row:

1. Documents are cut into pieces: one longer than `sequence_length` into full rows and a rest, any
   other is one piece (`index.py`).
2. The lengths of all pieces are counted, and groups of pieces of one length are given to groups of
   rows (`best_fit_decreasing`). No document has been looked at by itself so far.
3. Pieces are gone through a second time, in file order. The n-th piece of its length takes the n-th
   place that step 2 gave to that length, and its start is written into that place of `starts.npy`.
4. `read` finds the group of a row, from there its places and their lengths, and gathers the tokens.

Memory is bounded by the number of different lengths and a block of the index; `starts.npy` takes 8
bytes a piece on disk.
"""

import bisect
import math
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.planned import PlannedInstances, create_array, describe
from toolkit.data.instances.plans import Plan, PlanHeader, plan_of
from toolkit.data.instances.rows import Pieces
from toolkit.data.tokens.prepared import PreparedDataset, Split


class PackedDataset(PlannedInstances):
    """Each row holds whole documents, or a full row's worth of a longer one.

    Packing begins with the longest documents; rows are numbered so that the first ones, which
    evaluation takes, are spread evenly over all.
    """

    def __init__(self, prepared: PreparedDataset, split: Split, sequence_length: int) -> None:
        super().__init__(plan_of(prepared, split, "packed", sequence_length), _make)
        self._groups = _Groups(*(self._array(name) for name in _Groups._fields))
        self._step = spreading_step(max(1, self.num_instances))
        if prepared.unit is not None:
            self.units_per_row = int(self._groups.num_pieces.max(initial=0))

    def pieces(self, indices: np.ndarray) -> Pieces:
        rows = indices * self._step % self.num_instances
        groups = self._groups
        group = np.searchsorted(groups.first_row, rows, side="right") - 1
        counts = groups.num_pieces[group]
        first_places = groups.first_place[group] + (rows - groups.first_row[group]) * counts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = self._starts[np.repeat(first_places, counts) + within].astype(np.int64)
        lengths = groups.lengths[np.repeat(groups.first_length[group], counts) + within]
        return starts, lengths, counts


class _Groups(NamedTuple):
    """`RowGroup`s as int64 arrays: one element a group, but for `lengths`."""

    first_row: np.ndarray
    num_pieces: np.ndarray
    first_place: np.ndarray
    """Where `starts` holds the first piece of the group's first row; rows follow each other."""
    first_length: np.ndarray
    """Where `lengths` holds that of the first piece of each of its rows."""
    lengths: np.ndarray


def spreading_step(size: int) -> int:
    """A step with which 0, step, 2 step, ... modulo `size` visits every number once, and any first
    part of the way is spread evenly: `size` over the golden ratio (Weyl's sequence), or near it."""
    # Products of the step and a number below `size` must fit into 63 bits.
    step = max(1, min(size * 618_034 // 1_000_000, (1 << 62) // size))
    while math.gcd(step, size) != 1:
        step += 1
    return step


def _make(plan: Plan, index: DocumentIndex, folder: Path) -> PlanHeader:
    length = plan.sequence_length
    counts = np.zeros(length + 1, dtype=np.int64)
    for _, lengths in index.windows(length):
        counts += np.bincount(lengths, minlength=length + 1)

    placements, row_groups = best_fit_decreasing(counts, length)
    table = np.array([group[:3] for group in row_groups], dtype=np.int64).reshape(-1, 3)
    first_row, num_rows, num_pieces = table.T
    groups = _Groups(
        first_row=first_row,
        num_pieces=num_pieces,
        first_place=np.cumsum(num_rows * num_pieces) - num_rows * num_pieces,
        first_length=np.cumsum(num_pieces) - num_pieces,
        lengths=np.concatenate([np.empty(0, np.int64), *(g.lengths() for g in row_groups)]),
    )
    for name, values in groups._asdict().items():
        np.save(folder / f"{name}.npy", values)
    starts = create_array(folder, "starts", int(counts.sum()), np.uint64)
    _assign(index, length, counts, placements, groups, starts)
    return describe(plan, index, int(num_rows.sum()))


def _assign(
    index: DocumentIndex,
    sequence_length: int,
    counts: np.ndarray,
    placements: "list[Placement]",
    groups: _Groups,
    out: np.ndarray,
) -> None:
    """Write the start of every piece into its place."""
    table = np.array(placements, dtype=np.int64).reshape(-1, len(Placement._fields))
    _, first_row, num_rows, per_row, before = table.T
    # Pieces in the order of placements: from the longest to the shortest, then in file order.
    first_piece = np.cumsum(num_rows * per_row) - num_rows * per_row
    next_piece = counts.sum() - np.cumsum(counts)
    length_dtype = np.min_scalar_type(sequence_length)  # 16 bits sort much faster
    for starts, lengths in index.windows(sequence_length):
        order = np.argsort(lengths.astype(length_dtype), kind="stable")
        ordered = lengths[order]
        is_first = np.diff(ordered, prepend=-1) != 0
        firsts = np.flatnonzero(is_first)
        run = np.cumsum(is_first) - 1
        pieces = next_piece[ordered] + np.arange(len(ordered)) - firsts[run]
        next_piece += np.bincount(lengths, minlength=sequence_length + 1)

        placement = np.searchsorted(first_piece, pieces, side="right") - 1
        offset = pieces - first_piece[placement]
        row, inside = np.divmod(offset, per_row[placement])
        row += first_row[placement]
        group = np.searchsorted(groups.first_row, row, side="right") - 1
        place = (
            groups.first_place[group] + (row - groups.first_row[group]) * groups.num_pieces[group]
        )
        out[place + before[placement] + inside] = starts[order].astype(np.uint64)


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
        lengths, counts = np.array(found[::-1], dtype=np.int64).reshape(-1, 2).T
        return np.repeat(lengths, counts)


def best_fit_decreasing(
    counts: np.ndarray, sequence_length: int
) -> tuple[list[Placement], list[RowGroup]]:
    """Pack pieces into rows of `sequence_length` tokens; `counts` are how many there are of each
    length, `(sequence_length + 1,)`. Returns where pieces go, and what all rows hold, in order."""
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
        elif room in self._by_room:
            self._by_room[room].append(group)
        else:
            self._by_room[room] = deque([group])
            bisect.insort(self._rooms, room)
