"""What every kind of instances offers, and what a row of a batch consists of.

An instance is one row of `sequence_length` tokens. Rows are dictionaries of arrays:

    input_ids     int64  (rows, seq)   token ids
    label_mask    bool   (rows, seq)   which tokens the loss asks for, by position; absent: all
                                       (but the first of a row, which nothing predicts)
    document_ids  int32  (rows, seq)   tokens of one document have the same number, ascending in a
                                       row; attention stays inside it and positions start over
                                       with it; absent: the row is one sequence

Padding is a document of its own at the end of a row, with `label_mask` False.
"""

import itertools
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from toolkit.errors import DataError

Rows = dict[str, np.ndarray]


class DocumentPart(msgspec.Struct, frozen=True):
    """The tokens of one document inside an instance."""

    document: int
    """Its number in the split, from 0."""
    start: int
    """First token, counted from the document's own first."""
    end: int
    """One past the last."""
    num_tokens: int
    """Tokens of the whole document."""


class InstanceDataset(Protocol):
    """Instances of one split of one corpus, by number. Reading them needs no torch."""

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest row."""

    @property
    def num_instances(self) -> int:
        """Instances are numbered from 0 to this, exclusively."""

    @property
    def fingerprint(self) -> str:
        """Identifies what every instance holds: tokens, and how they are cut into rows."""

    @property
    def bytes_per_token(self) -> float:
        """Average UTF-8 bytes of text per token; 0.0 where that is not known."""

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that made the tokens; None where that is not known."""

    def read(self, indices: np.ndarray) -> Rows:
        """The instances `indices`, shape `(rows,)`, in that order. No Python per token."""

    def documents(self, index: int) -> list[DocumentPart]:
        """The documents in one instance, in order; they cover the row up to its padding."""


def check_ids(rows: Rows, indices: np.ndarray, vocab_size: int) -> None:
    """Raise DataError when the instances `indices` hold an id that the vocabulary has not.

    A model would stop at it too, but on a GPU without a word about where it is.
    """
    ids = rows["input_ids"]
    if not vocab_size or not ids.size or int(ids.max()) < vocab_size:
        return
    row, place = np.unravel_index(int(ids.argmax()), ids.shape)
    raise DataError(
        f"instance {int(indices[row])}, token {int(place)}: id {int(ids.max())}, but the "
        f"vocabulary has {vocab_size}; the token files are damaged (`toolkit data inspect` says "
        "where): restore them, or prepare the data again"
    )


class Decoder(Protocol):
    """A tokenizer, as far as text is wanted."""

    def decode(self, ids: np.ndarray) -> str: ...


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
    tokenizer: Decoder | None,
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


def _text(tokenizer: Decoder | None, ids: np.ndarray) -> str:
    if tokenizer is None:
        return " ".join(str(number) for number in ids.tolist()) + " "
    return tokenizer.decode(ids)
