"""What instances that follow a plan have in common, and the simplest of them: padded ones."""

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.plans import Plan, PlanHeader, ensure_plan, plan_of
from toolkit.data.tokens.prepared import PreparedDataset, Split


class PlannedInstances:
    """Base of packed, padded and variable instances, each an `InstanceDataset`.

    Attributes:
        header: counts, and the share of positions filled.
    """

    def __init__(self, plan: Plan, make: Callable[[Plan, DocumentIndex, Path], PlanHeader]) -> None:
        """`make` writes the plan's arrays into a folder, where they are not there yet. DataError:
        the token files or their plan are damaged, or the plan cannot be written."""
        prepared, split = plan.prepared, plan.split
        self._plan, self._index = plan, DocumentIndex(prepared, split)

        def make_checked(folder: Path) -> PlanHeader:
            self._index.verify()
            return make(plan, self._index, folder)

        self.header = ensure_plan(plan, make_checked)
        self.sequence_length = plan.sequence_length
        self.num_instances = self.header.num_instances
        self.fingerprint = plan.fingerprint
        self.bytes_per_token = prepared.bytes_per_token(split)
        self.tokenizer_folder = prepared.tokenizer_folder
        self._pad_id = prepared.manifest.eos_id or 0
        self._tokens = np.asarray(prepared.tokens(split))
        self._pages = Pages(self._tokens)
        mask = prepared.target_mask(split)
        self._targets = None if mask is None else np.asarray(mask)
        self._starts = self._array("starts")

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.asarray(np.load(self._plan.folder / f"{name}.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise self._plan.damaged(f"{name}.npy: {error}") from None

    def _pieces(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and length of each piece of these rows, and the number of pieces of each row."""
        raise NotImplementedError

    def read(self, indices: np.ndarray) -> Rows:
        """Padding has the id of the end-of-document token, or 0."""
        starts, lengths, counts = self._pieces(np.asarray(indices))
        self._pages.request(starts, lengths)
        return gather_rows(
            self._tokens,
            self._targets,
            starts=starts,
            lengths=lengths,
            pieces_per_row=counts,
            sequence_length=self.sequence_length,
            pad_id=self._pad_id,
        )

    def documents(self, index: int) -> list[DocumentPart]:
        """All rows of a document name the same one."""
        starts, lengths, _ = self._pieces(np.array([index]))
        pieces = zip(starts.tolist(), lengths.tolist(), strict=True)
        return [part for start, length in pieces for part in self._index.parts(start, length)]


def describe(plan: Plan, index: DocumentIndex, num_rows: int, **others: Any) -> PlanHeader:
    """The header of rows that hold all tokens, but for what `others` say."""
    num_documents = cut_documents = 0
    for _, lengths in index.blocks():
        num_documents += int((lengths > 0).sum())
        cut_documents += int((lengths > plan.sequence_length).sum())
    found = {
        "num_tokens": index.num_tokens,
        "efficiency": index.num_tokens / max(1, num_rows * plan.sequence_length),
        **others,
    }
    return PlanHeader(
        kind=plan.kind,
        split=plan.split,
        sequence_length=plan.sequence_length,
        fingerprint=plan.fingerprint,
        num_instances=num_rows,
        num_documents=num_documents,
        cut_documents=cut_documents,
        **found,
    )


def create_array(folder: Path, name: str, shape: int, dtype: "np.dtype | type") -> np.ndarray:
    """A new array of a plan to fill: a memory map whose place on disk is taken already (a full
    disk is an OSError here, where it would kill the process later)."""
    path = folder / f"{name}.npy"
    if shape == 0:
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(shape,))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


class PaddedDataset(PlannedInstances):
    """One document a row, padded, in the order of documents; for evaluation.

    A document longer than `sequence_length` takes several rows that follow each other, without
    overlap: every token is in exactly one row. What a later row predicts knows nothing of the rows
    before it. Empty documents have no row.
    """

    def __init__(self, prepared: PreparedDataset, split: Split, sequence_length: int) -> None:
        super().__init__(plan_of(prepared, split, "padded", sequence_length), _make_padded)
        self._lengths = self._array("lengths")

    def _pieces(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts = self._starts[indices].astype(np.int64)
        lengths = self._lengths[indices].astype(np.int64)
        return starts, lengths, np.ones(len(indices), dtype=np.int64)


def _make_padded(plan: Plan, index: DocumentIndex, folder: Path) -> PlanHeader:
    length = plan.sequence_length
    num_rows = sum(int((-(-lengths // length)).sum()) for _, lengths in index.blocks())
    all_starts = create_array(folder, "starts", num_rows, np.uint64)
    all_lengths = create_array(folder, "lengths", num_rows, np.min_scalar_type(length))
    done = 0
    for starts, lengths in index.windows(length):
        all_starts[done : done + len(starts)] = starts
        all_lengths[done : done + len(starts)] = lengths
        done += len(starts)
    return describe(plan, index, num_rows)


LONG_PIECE = 200
"""Mean tokens from which on it is quicker to copy piece by piece than to index all tokens."""


def gather_rows(
    tokens: np.ndarray,
    targets: np.ndarray | None,
    *,
    starts: np.ndarray,
    lengths: np.ndarray,
    pieces_per_row: np.ndarray,
    sequence_length: int,
    pad_id: int,
) -> Rows:
    """Rows of `sequence_length` tokens: pieces one after the other, then padding. Each piece is a
    document, and so is padding.

    Args:
        tokens: all ids of the split, `(num_tokens,)`.
        targets: 1 for those the loss asks for, `(num_tokens,)`; None: all.
        starts, lengths: of each piece in `tokens`, row after row: int64, `(pieces,)`.
        pieces_per_row: int64, `(rows,)`; each row has one at least.
    """
    num_rows = len(pieces_per_row)
    row_ends = np.cumsum(pieces_per_row)
    piece_ends = np.concatenate(([0], np.cumsum(lengths)))
    used = np.diff(piece_ends[np.concatenate(([0], row_ends))])

    # A piece of padding, perhaps of no tokens, ends every row.
    is_padding = np.zeros(len(lengths) + num_rows, dtype=bool)
    is_padding[row_ends + np.arange(num_rows)] = True
    all_lengths = np.empty(len(is_padding), dtype=np.int64)
    all_lengths[is_padding] = sequence_length - used
    all_lengths[~is_padding] = lengths
    all_starts = np.zeros(len(is_padding), dtype=np.int64)
    all_starts[~is_padding] = starts
    first_pieces = np.concatenate(([0], row_ends[:-1])) + np.arange(num_rows)
    numbers = np.arange(len(is_padding), dtype=np.int32)
    numbers -= np.repeat(first_pieces, pieces_per_row + 1).astype(np.int32)

    label_mask = np.repeat(~is_padding, all_lengths)
    if lengths.sum() >= LONG_PIECE * len(lengths):
        places = (np.cumsum(all_lengths) - all_lengths)[~is_padding]
        input_ids = _copy(tokens, starts, lengths, places, np.full(len(label_mask), pad_id))
        if targets is not None:
            label_mask &= (
                _copy(targets, starts, lengths, places, np.zeros(len(label_mask), np.uint8)) != 0
            )
    else:
        positions = _positions(all_starts, all_lengths)
        # Only padding may point beyond the end, and its ids are replaced.
        if targets is not None:
            targets_there = targets.take(positions, mode="clip")
        input_ids = positions
        input_ids[:] = tokens.take(positions, mode="clip")
        input_ids[np.flatnonzero(~label_mask)] = pad_id
        if targets is not None:
            label_mask &= targets_there != 0
    rows = {
        "input_ids": input_ids,
        "label_mask": label_mask,
        "document_ids": np.repeat(numbers, all_lengths),
    }
    return {name: values.reshape(num_rows, sequence_length) for name, values in rows.items()}


def _copy(
    source: np.ndarray, starts: np.ndarray, lengths: np.ndarray, places: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """`out` with each piece of `source` in its place."""
    pieces = zip(starts.tolist(), lengths.tolist(), places.tolist(), strict=True)
    for start, length, place in pieces:
        out[place : place + length] = source[start : start + length]
    return out


def _positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions of the tokens of all pieces, one piece after the other.

    Each is one more than the one before, but where a piece begins. They are summed up in place, and
    their memory becomes `input_ids`: fresh memory costs more than all the rest.
    """
    positions = np.ones(lengths.sum(), dtype=np.int64)
    has_tokens = lengths > 0
    firsts, sizes = starts[has_tokens], lengths[has_tokens]
    before = np.concatenate(([0], firsts[:-1] + sizes[:-1] - 1))
    positions[np.cumsum(sizes) - sizes] = firsts - before
    return np.cumsum(positions, out=positions)


SMALLEST_BYTES = 512
"""Shorter stretches are not asked for: a request costs as much as copying them."""


class Pages:
    """Pages of a memory-mapped array of one dimension; of other arrays, nothing."""

    def __init__(self, array: np.ndarray) -> None:
        self._itemsize = array.itemsize
        self._map = _map_of(array) if hasattr(mmap, "MADV_WILLNEED") else None
        self._first = 0
        if self._map is not None:
            whole = np.frombuffer(self._map, dtype=np.uint8)
            self._first = array.__array_interface__["data"][0] - whole.ctypes.data

    def request(self, starts: np.ndarray, num_items: np.ndarray | int) -> None:
        """Fetch `num_items` items from each of `starts` on, without waiting for them."""
        if self._map is None:
            return
        num_bytes = np.broadcast_to(num_items, starts.shape) * self._itemsize
        is_long = num_bytes >= SMALLEST_BYTES
        first = self._first + starts[is_long].astype(np.int64) * self._itemsize
        pages = first // mmap.PAGESIZE * mmap.PAGESIZE
        sizes = first - pages + num_bytes[is_long]
        advise, how = self._map.madvise, mmap.MADV_WILLNEED
        for page, size in zip(pages.tolist(), sizes.tolist(), strict=True):
            advise(how, page, size)


def _map_of(array: np.ndarray) -> mmap.mmap | None:
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "_mmap", None) or getattr(base, "base", None)
    return base
