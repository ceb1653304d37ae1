"""What instances that follow a plan have in common: the plan, the tokens, and their documents."""

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.plans import Plan, PlanHeader, ensure_plan


class PlannedInstances:
    """Base of packed, padded and variable instances.

    Attributes:
        header: counts, and the share of positions filled.
    """

    def __init__(self, plan: Plan, make: Callable[[Path], PlanHeader]) -> None:
        """`make` writes the plan's arrays into a folder, where they are not there yet.

        Raises:
            DataError: the token files or their plan are damaged, or the plan cannot be written.
        """
        prepared, split = plan.prepared, plan.split
        self.header = ensure_plan(plan, make)
        self.sequence_length = plan.sequence_length
        self.num_instances = self.header.num_instances
        self.fingerprint = plan.fingerprint
        self.bytes_per_token = prepared.bytes_per_token(split)
        self.tokenizer_folder = prepared.tokenizer_folder
        self._pad_id = prepared.manifest.eos_id or 0
        self._index = DocumentIndex(prepared, split)
        self._tokens = np.asarray(prepared.tokens(split))
        self._pages = Pages(self._tokens)
        mask = prepared.target_mask(split)
        self._targets = None if mask is None else np.asarray(mask)
        self._starts = plan.array("starts")

    def _pieces(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and length of each piece of these rows, and the number of pieces of each row."""
        raise NotImplementedError

    def read(self, indices: np.ndarray) -> Rows:
        """See `InstanceDataset`; padding has the id of the end-of-document token, or 0."""
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
        """See `InstanceDataset`; all rows of a document name the same one."""
        starts, lengths, _ = self._pieces(np.array([index]))
        pieces = zip(starts.tolist(), lengths.tolist(), strict=True)
        return [part for start, length in pieces for part in self._index.parts(start, length)]


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
    """Rows of `sequence_length` tokens: pieces one after the other, then padding.

    Args:
        tokens: all ids of the split, `(num_tokens,)`.
        targets: 1 for those the loss asks for, `(num_tokens,)`; None: all.
        starts, lengths: of each piece in `tokens`, row after row: int64, `(pieces,)`.
        pieces_per_row: int64, `(rows,)`; each row has one at least.

    Returns:
        `input_ids`, `label_mask` and `document_ids`; each piece is a document, and so is padding.
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
