"""Instances for reading: their text, cut where the document or the loss mask changes."""

import itertools
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows

if TYPE_CHECKING:
    from toolkit.data.tokenizers.tokenizer import Tokenizer


class DecodedPiece(msgspec.Struct, frozen=True):
    """Consecutive tokens of one document that are all targets, or none of them."""

    document: int | None
    """Its number in the split; None: padding."""
    is_target: bool
    """Whether the loss counts the prediction of these tokens."""
    num_tokens: int
    text: str


def target_mask(rows: Rows) -> np.ndarray:
    """Which tokens the loss asks for, bool of the shape `(rows, seq)` of `input_ids`.

    The same as `toolkit.models.loss.shift_labels`, asked from the other side: labels are
    shifted inside a row, so nothing predicts its first token, nor the first of a document where
    attention stays inside documents.
    """
    mask = np.ones(rows["input_ids"].shape, dtype=bool)
    if "label_mask" in rows:
        mask &= rows["label_mask"]
    mask[:, 0] = False
    if "document_ids" in rows:
        documents = rows["document_ids"]
        mask[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    return mask


def decode_pieces(
    tokenizer: "Tokenizer | None",
    ids: np.ndarray,
    is_target: np.ndarray,
    parts: list[DocumentPart],
) -> list[DecodedPiece]:
    """The text of one row; without a tokenizer, its ids.

    Args:
        ids, is_target: the row, and its row of `target_mask`; both `(seq,)`.
        parts: its documents in order; tokens after them are padding.

    A character whose bytes lie on both sides of a cut shows as U+FFFD.
    """
    pieces, position = [], 0
    lengths = [(part.document, part.end - part.start) for part in parts]
    for document, length in [*lengths, (None, len(ids) - sum(n for _, n in lengths))]:
        if not length:
            continue
        stop = position + length
        changes = np.flatnonzero(np.diff(is_target[position:stop])) + 1
        bounds = [position, *(position + changes).tolist(), stop]
        for begin, end in itertools.pairwise(bounds):
            text = _text(tokenizer, ids[begin:end])
            pieces.append(DecodedPiece(document, bool(is_target[begin]), end - begin, text))
        position = stop
    return pieces


def _text(tokenizer: "Tokenizer | None", ids: np.ndarray) -> str:
    if tokenizer is None:
        return " ".join(str(number) for number in ids.tolist()) + " "
    return tokenizer.decode(ids)
