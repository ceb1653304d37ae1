"""Documents cut into powers of two, one bucket of rows for each length.

Dataset decomposition (Pouransari et al. 2024, "Dataset Decomposition: Faster LLM Training with
Variable Sequence Length Curriculum"): a document of n tokens becomes as many rows of
`sequence_length` as fit, then one row for each power of two in what is left, the greatest first,
down to `min_sequence_length`. So every row is of one document, nothing is padded, and only rests
shorter than the shortest row are dropped. In what order rows are read: `variable_order.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.identity import variable_plan
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.planned import PlannedInstances
from toolkit.data.instances.plans import Bucket, Plan, PlanHeader, create_array
from toolkit.data.instances.variable_order import VariableOrder
from toolkit.data.tokens.prepared import PreparedDataset, Split

__all__ = ["VariableDataset", "VariableOrder"]


class VariableDataset(PlannedInstances):
    """Instances numbered bucket by bucket, from the shortest rows to the longest.

    Attributes:
        sequence_length: tokens of the longest rows.
        buckets: those that hold instances, by length.
        header: counts; `dropped_tokens` are the rests shorter than the shortest row.

    Raises:
        ConfigError: `sequence_length` is no power of two, or less than `min_sequence_length`.
        DataError: the token files or their plan are damaged, or the plan cannot be written.
    """

    def __init__(
        self, prepared: PreparedDataset, split: Split, sequence_length: int, *, min_length: int
    ) -> None:
        plan = variable_plan(prepared, split, sequence_length, min_length=min_length)
        super().__init__(plan, lambda folder: _make(plan, folder, min_length))
        self.buckets = self.header.buckets
        self._firsts = np.array([bucket.first for bucket in self.buckets], dtype=np.int64)

    def read(self, indices: np.ndarray) -> Rows:
        """The instances `indices`, all of one bucket: rows of that bucket's length. A row is one
        sequence, so there are no `document_ids`.

        Raises:
            ValueError: instances of several buckets, whose rows have different lengths.
        """
        indices = np.asarray(indices)
        length = self.buckets[self._bucket_of_all(indices)].length if len(indices) else 0
        starts = self._starts[indices].astype(np.int64)
        self._pages.request(starts, length)
        positions = starts[:, None] + np.arange(length)
        rows = {"input_ids": self._tokens[positions].astype(np.int64)}
        if self._targets is not None:
            rows["label_mask"] = self._targets[positions] != 0
        return rows

    def documents(self, index: int) -> list[DocumentPart]:
        """See `InstanceDataset`."""
        length = self.buckets[self.bucket_of(index)].length
        return self._index.parts(int(self._starts[index]), length)

    def bucket_of(self, index: int) -> int:
        """Place in `buckets` of an instance's bucket."""
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def _bucket_of_all(self, indices: np.ndarray) -> int:
        first, last = self.bucket_of(int(indices.min())), self.bucket_of(int(indices.max()))
        if first != last:
            lengths = self.buckets[first].length, self.buckets[last].length
            raise ValueError(f"instances of one length can be read together, not of {lengths}")
        return first


def _make(plan: Plan, folder: Path, min_length: int) -> PlanHeader:
    longest, index = plan.sequence_length, DocumentIndex(plan.prepared, plan.split)
    index.verify()
    lengths_of_rows = [1 << bit for bit in range(min_length.bit_length() - 1, longest.bit_length())]
    counts = dict.fromkeys(lengths_of_rows, 0)
    num_documents = cut_documents = dropped_tokens = dropped_documents = 0
    for _, lengths in index.blocks():
        num_documents += int(np.count_nonzero(lengths))
        cut_documents += int(np.count_nonzero(lengths > longest))
        dropped_tokens += int((lengths % min_length).sum())
        dropped_documents += int(np.count_nonzero((lengths > 0) & (lengths < min_length)))
        counts[longest] += int((lengths // longest).sum())
        for length in lengths_of_rows[:-1]:
            counts[length] += int(np.count_nonzero(lengths & length))

    buckets, num_rows = [], 0
    for length in lengths_of_rows:
        if counts[length]:
            buckets.append(Bucket(length, num_rows, counts[length]))
            num_rows += counts[length]
    all_starts = create_array(folder, "starts", num_rows, np.uint64)
    for bucket in buckets:
        done = bucket.first
        for starts in _starts_of_rows(index, bucket.length, longest):
            all_starts[done : done + len(starts)] = starts
            done += len(starts)
    if isinstance(all_starts, np.memmap):
        all_starts.flush()
    return PlanHeader(
        kind=plan.kind,
        split=plan.split,
        sequence_length=longest,
        fingerprint=plan.fingerprint,
        num_instances=num_rows,
        num_documents=num_documents,
        num_tokens=index.num_tokens - dropped_tokens,
        efficiency=1.0 if num_rows else 0.0,
        cut_documents=cut_documents,
        dropped_tokens=dropped_tokens,
        dropped_documents=dropped_documents,
        buckets=tuple(buckets),
    )


def _starts_of_rows(index: DocumentIndex, length: int, longest: int) -> Iterator[np.ndarray]:
    """Where the rows of one length start, in file order."""
    if length == longest:
        for starts, lengths in index.windows(longest):
            yield starts[lengths == longest]
        return
    for starts, lengths in index.blocks():
        has_row = (lengths & length) != 0
        # Longer rows took the higher bits of the document's length.
        yield starts[has_row] + (lengths[has_row] & -(2 * length))
