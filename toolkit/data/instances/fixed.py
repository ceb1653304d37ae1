"""Token files as rows of one length: all documents one after the other, cut into equal rows."""

import numpy as np

from toolkit.data.instances.base import Rows
from toolkit.data.instances.plans import instances_fingerprint
from toolkit.data.instances.rows import Pieces, TokenRows
from toolkit.data.tokens.prepared import PreparedDataset, Split


class TokenDataset(TokenRows):
    """Instance i is tokens [i * sequence_length, (i + 1) * sequence_length) of a split; the last
    tokens, fewer than one instance, are left out. `intra_document_masking`: whether `read` gives
    `document_ids`."""

    def __init__(
        self,
        prepared: PreparedDataset,
        split: Split,
        sequence_length: int,
        *,
        intra_document_masking: bool = False,
    ) -> None:
        fingerprint = prepared.fingerprint(split)
        settings = {"sequence_length": sequence_length, "intra_document_masking": True}
        if intra_document_masking:
            fingerprint = instances_fingerprint(prepared, split, "fixed", **settings)
        super().__init__(prepared, split, sequence_length, fingerprint)
        self.num_instances = len(self._tokens) // sequence_length
        self._starts = self.index.starts if intra_document_masking else None

    def pieces(self, indices: np.ndarray) -> Pieces:
        ones = np.ones(len(indices), dtype=np.int64)
        return indices * self.sequence_length, ones * self.sequence_length, ones

    def read(self, indices: np.ndarray) -> Rows:
        rows = super().read(indices)
        if self._starts is not None:
            rows["document_ids"] = self._document_ids(self._starts, np.asarray(indices))
        return rows

    def _document_ids(self, starts: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """A row's first token is of document 0; every start of a document inside adds 1."""
        # Compared as uint64: with other types numpy would convert the whole index first.
        first = indices.astype(np.uint64) * np.uint64(self.sequence_length)
        begin = np.searchsorted(starts, first, side="right")
        end = np.searchsorted(starts, first + np.uint64(self.sequence_length), side="left")
        counts = end - begin
        rows = np.repeat(np.arange(len(indices)), counts)
        inside = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = starts[begin[rows] + inside] - first[rows]
        # Marked, not counted: documents that start at the same place are empty but for one.
        is_start = np.zeros((len(indices), self.sequence_length), dtype=bool)
        is_start[rows, columns.astype(np.int64)] = True
        return np.cumsum(is_start, axis=1, dtype=np.int32)
