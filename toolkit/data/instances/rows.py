"""Rows made of pieces of the token file, gathered without Python per token."""

import numpy as np

from toolkit.data.instances.base import Rows

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
