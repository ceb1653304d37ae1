"""Token files as rows of one length: all documents one after the other, cut into equal rows."""

import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.planned import Pages
from toolkit.data.instances.plans import instances_fingerprint
from toolkit.data.tokens.prepared import PreparedDataset, Split


class TokenDataset:
    """Instance i is tokens [i * sequence_length, (i + 1) * sequence_length) of a split. An
    `InstanceDataset`.

    Attributes:
        instances: memory map of shape `(num_instances, sequence_length)`; the last tokens, fewer
            than one instance, are left out.
        targets: the same of the tokens the loss asks for (uint8, 0 or 1); None: all.
        intra_document_masking: whether `read` gives `document_ids`.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        split: Split,
        sequence_length: int,
        *,
        intra_document_masking: bool = False,
    ) -> None:
        self.sequence_length = sequence_length
        self.intra_document_masking = intra_document_masking
        self.fingerprint = prepared.fingerprint(split)
        self.bytes_per_token = prepared.bytes_per_token(split)
        self.tokenizer_folder = prepared.tokenizer_folder
        tokens = np.asarray(prepared.tokens(split))
        self._pages = Pages(tokens)
        self.num_instances = len(tokens) // sequence_length
        shape = (self.num_instances, sequence_length)
        used = self.num_instances * sequence_length
        self.instances = tokens[:used].reshape(shape)
        mask = prepared.target_mask(split)
        self.targets = None if mask is None else np.asarray(mask)[:used].reshape(shape)
        self._prepared, self._split = prepared, split
        self._index = None
        if intra_document_masking:
            self._index = DocumentIndex(prepared, split)
            self.fingerprint = instances_fingerprint(
                prepared,
                split,
                "fixed",
                sequence_length=sequence_length,
                intra_document_masking=True,
            )

    def read(self, indices: np.ndarray) -> Rows:
        self._pages.request(np.asarray(indices) * self.sequence_length, self.sequence_length)
        rows = {"input_ids": self.instances[indices].astype(np.int64)}
        if self.targets is not None:
            rows["label_mask"] = self.targets[indices] != 0
        if self._index is not None:
            rows["document_ids"] = self._document_ids(self._index.starts, np.asarray(indices))
        return rows

    def documents(self, index: int) -> list[DocumentPart]:
        found = self._index or DocumentIndex(self._prepared, self._split)
        return found.parts(index * self.sequence_length, self.sequence_length)

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
