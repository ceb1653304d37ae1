"""Rows of token files: which tokens each holds, and reading them without Python per token."""

import functools
import mmap
import resource
import threading

import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.tokens.prepared import PreparedDataset, Split

Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Where each piece of some rows begins in the .bin file, its tokens, and the number of pieces of
each row; int64."""


class TokenRows:
    """Base of all instances of token files, each an `InstanceDataset`."""

    num_instances: int

    def __init__(
        self, prepared: PreparedDataset, split: Split, sequence_length: int, fingerprint: str
    ) -> None:
        self._prepared, self._split = prepared, split
        self.sequence_length, self.fingerprint = sequence_length, fingerprint
        self.bytes_per_token = prepared.bytes_per_token(split)
        self.tokenizer_folder = prepared.tokenizer_folder
        self.unit = prepared.unit
        self.num_units = prepared.num_units(split)
        self._tokens = np.asarray(prepared.tokens(split))
        self._pages = Pages(self._tokens)
        mask = prepared.target_mask(split)
        self._targets = None if mask is None else np.asarray(mask)

    @functools.cached_property
    def index(self) -> DocumentIndex:
        """Where documents start."""
        return DocumentIndex(self._prepared, self._split)

    def pieces(self, indices: np.ndarray) -> Pieces:
        """What these instances consist of."""
        raise NotImplementedError

    def read(self, indices: np.ndarray) -> Rows:
        """The instances `indices`, all of one length and each one piece of the file; those that
        are put together override this."""
        starts, lengths, _ = self.pieces(np.asarray(indices))
        length = int(lengths[0]) if len(lengths) else 0
        self._pages.request(starts, length)
        rows = {"input_ids": _windows(self._tokens, length)[starts].astype(np.int64)}
        if self._targets is not None:
            rows["label_mask"] = _windows(self._targets, length)[starts] != 0
        return rows

    def documents(self, index: int) -> list[DocumentPart]:
        """The documents in one instance; all rows of a document name the same one."""
        starts, lengths, _ = self.pieces(np.array([index]))
        pieces = zip(starts.tolist(), lengths.tolist(), strict=True)
        return [part for start, length in pieces for part in self.index.parts(start, length)]


def _windows(array: np.ndarray, length: int) -> np.ndarray:
    """A view: element i is `array[i : i + length]`."""
    return np.lib.stride_tricks.sliding_window_view(array, length)


LONG_PIECE = 400
"""Mean tokens from which on it is quicker to join slices than to index all tokens."""


def gather_rows(
    tokens: np.ndarray,
    targets: np.ndarray | None,
    pieces: Pieces,
    *,
    sequence_length: int,
    pad_id: int,
    keep_kinds: bool = False,
) -> Rows:
    """Rows of `sequence_length` tokens: pieces one after the other, then padding. Each piece is a
    document, and so is padding.

    Args:
        tokens: all ids of the split, `(num_tokens,)`.
        targets: 1 for those the loss asks for, `(num_tokens,)`; None: all.
        pieces: row after row; each row has one at least.
        keep_kinds: give the mask as it is in the file, uint8, which tells kinds of targets apart.
    """
    starts, lengths, pieces_per_row = pieces
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

    label_mask = None
    if lengths.sum() >= LONG_PIECE * len(lengths):
        pieces = all_starts, all_lengths, is_padding
        input_ids = _joined(tokens, pieces).astype(np.int64)
        if targets is not None:
            label_mask = _joined(targets, pieces)
    else:
        # Only padding may point beyond the end, and its ids are replaced.
        positions = _positions(all_starts, all_lengths)
        if targets is not None:
            label_mask = targets.take(positions, mode="clip")
        input_ids = positions
        input_ids[:] = tokens.take(positions, mode="clip")
    if label_mask is None:
        label_mask = np.ones(len(input_ids), dtype=bool)
    elif not keep_kinds:
        label_mask = label_mask != 0
    ends = np.arange(1, num_rows + 1) * sequence_length
    for end, used_there in zip(ends.tolist(), used.tolist(), strict=True):
        if used_there < sequence_length:
            padding = slice(end - sequence_length + used_there, end)
            input_ids[padding] = pad_id
            label_mask[padding] = False
    rows = {
        "input_ids": input_ids,
        "label_mask": label_mask,
        "document_ids": np.repeat(numbers, all_lengths),
    }
    return {name: values.reshape(num_rows, sequence_length) for name, values in rows.items()}


def _joined(source: np.ndarray, pieces: Pieces) -> np.ndarray:
    """Slices of `source`, and zeros for padding: where each begins, its length, and whether it is
    padding."""
    starts, lengths, is_padding = pieces
    blank = np.zeros(lengths.max(), source.dtype)
    bounds = zip(starts.tolist(), (starts + lengths).tolist(), is_padding.tolist(), strict=True)
    slices = [(blank if is_blank else source)[start:end] for start, end, is_blank in bounds]
    return np.concatenate(slices)


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
CACHED_READS = 16
"""After so many reads in a row for which nothing came from a disk, pages are not asked for..."""
MOST_CACHED_READS = 1 << 16
"""...and, where that was wrong, after twice as many from then on, up to this number."""


class Pages:
    """Pages of a memory-mapped array of one dimension; of other arrays, nothing."""

    def __init__(self, array: np.ndarray) -> None:
        self._itemsize = array.itemsize
        self._map = _map_of(array) if hasattr(mmap, "MADV_WILLNEED") else None
        self._first = 0
        self._usage: tuple[int, int, int] | None = None
        self._cached_reads, self._wanted_reads = 0, CACHED_READS
        if self._map is not None:
            whole = np.frombuffer(self._map, dtype=np.uint8)
            self._first = array.__array_interface__["data"][0] - whole.ctypes.data

    def request(self, starts: np.ndarray, num_items: np.ndarray | int) -> None:
        """Fetch `num_items` items from each of `starts` on, without waiting for them. Nothing is
        asked where the reads before this one tell that tokens are in memory: that would cost as
        much as all the rest of reading."""
        if self._map is None or self._seem_cached():
            return
        num_bytes = np.broadcast_to(num_items, starts.shape) * self._itemsize
        is_long = num_bytes >= SMALLEST_BYTES
        first = self._first + starts[is_long].astype(np.int64) * self._itemsize
        pages = first // mmap.PAGESIZE * mmap.PAGESIZE
        sizes = first - pages + num_bytes[is_long]
        advise, how = self._map.madvise, mmap.MADV_WILLNEED
        for page, size in zip(pages.tolist(), sizes.tolist(), strict=True):
            advise(how, page, size)

    def _seem_cached(self) -> bool:
        """Whether the last reads took nothing from a disk: this thread has asked for no blocks, and
        waited for no page."""
        if not hasattr(resource, "RUSAGE_THREAD"):
            return False
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        before, self._usage = (
            self._usage,
            (threading.get_ident(), usage.ru_inblock, usage.ru_majflt),
        )
        if self._usage == before:
            self._cached_reads += 1
        else:
            if self._cached_reads >= self._wanted_reads:
                self._wanted_reads = min(2 * self._wanted_reads, MOST_CACHED_READS)
            self._cached_reads = 0
        return self._cached_reads >= self._wanted_reads


def _map_of(array: np.ndarray) -> mmap.mmap | None:
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "_mmap", None) or getattr(base, "base", None)
    return base
