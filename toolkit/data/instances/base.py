"""What every kind of instances offers, and what a row of a batch consists of.

An instance is one row of `sequence_length` tokens. Rows are dictionaries of arrays:

    input_ids     int64  (rows, seq)   token ids
    label_mask    bool   (rows, seq)   which tokens the loss asks for, by position; absent: all
                                       (but the first of a row, which nothing predicts)
                                       of units (`toolkit.data.tokens.units`) uint8: the kind of
                                       target
    document_ids  int32  (rows, seq)   tokens of one document have the same number, ascending in a
                                       row; attention stays inside it and positions start over
                                       with it; absent: the row is one sequence
    units         int64  (rows, K)     number in the split of each unit of the row, -1 where there
                                       is none; absent: documents form no units. The documents of
                                       a row's k-th unit are 2 k and 2 k + 1.

Padding is a document of its own at the end of a row, with `label_mask` False.
"""

from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from toolkit.errors import DataError

Rows = dict[str, np.ndarray]


class DocumentPart(msgspec.Struct, frozen=True):
    """Tokens [start, end) of one document, counted from its own first, inside an instance."""

    document: int
    """Its number in the split, from 0."""
    start: int
    end: int
    num_tokens: int
    """Tokens of the whole document."""


class InstanceDataset(Protocol):
    """Instances of one split of one corpus, by number. Reading them needs no torch."""

    sequence_length: int
    """Tokens of the longest row."""
    num_instances: int
    """Instances are numbered from 0 to this, exclusively."""
    fingerprint: str
    """Identifies what every instance holds: tokens, and how they are cut into rows."""
    bytes_per_token: float
    """Average UTF-8 bytes of text per token; 0.0 where that is not known."""
    tokenizer_folder: Path | None
    """Folder of the tokenizer that made the tokens; None where that is not known."""

    def read(self, indices: np.ndarray) -> Rows:
        """The instances `indices`, shape `(rows,)`, in that order. No Python per token."""

    def documents(self, index: int) -> list[DocumentPart]:
        """The documents in one instance, in order; they cover the row up to its padding."""


def check_ids(rows: Rows, indices: np.ndarray, vocab_size: int) -> None:
    """Raise DataError when the instances `indices` hold an id that the vocabulary has not: a model
    on a GPU would stop at it without a word about where it is."""
    ids = rows["input_ids"]
    if not vocab_size or not ids.size or int(ids.max()) < vocab_size:
        return
    row, place = np.unravel_index(int(ids.argmax()), ids.shape)
    raise DataError(
        f"instance {int(indices[row])}, token {int(place)}: id {int(ids.max())}, but the "
        f"vocabulary has {vocab_size}; the token files are damaged (`toolkit data inspect` says "
        "where): restore them, or prepare the data again"
    )


def target_mask(rows: Rows) -> np.ndarray:
    """Which tokens the loss asks for, bool `(rows, seq)`; as `toolkit.models.loss.shift_labels` has
    it: nothing predicts the first token of a row, nor of a document where attention stays inside.
    """
    mask = np.ones(rows["input_ids"].shape, dtype=bool)
    if "label_mask" in rows:
        mask &= rows["label_mask"] != 0
    mask[:, 0] = False
    if "document_ids" in rows:
        documents = rows["document_ids"]
        mask[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    return mask
