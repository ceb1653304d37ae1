"""One document a row, padded; for evaluation."""

from pathlib import Path

import numpy as np

from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.planned import PlannedInstances, gather_rows
from toolkit.data.instances.plans import Plan, PlanHeader, create_array, padded_plan
from toolkit.data.tokens.prepared import PreparedDataset, Split


class PaddedDataset(PlannedInstances):
    """Rows in the order of documents. A document longer than `sequence_length` takes several rows
    that follow each other, without overlap: every token is in exactly one row. What a later row
    predicts knows nothing of the rows before it. Empty documents have no row.

    Attributes:
        header: counts, and the share of positions filled.

    Raises:
        DataError: the token files or their plan are damaged, or the plan cannot be written.
    """

    def __init__(self, prepared: PreparedDataset, split: Split, sequence_length: int) -> None:
        plan = padded_plan(prepared, split, sequence_length)
        super().__init__(plan, lambda folder: _make(plan, folder))
        self._lengths = plan.array("lengths")

    def read(self, indices: np.ndarray) -> Rows:
        """See `InstanceDataset`; padding has the id of the end-of-document token, or 0."""
        starts = self._starts[indices].astype(np.int64)
        lengths = self._lengths[indices].astype(np.int64)
        self._pages.request(starts, lengths)
        return gather_rows(
            self._tokens,
            self._targets,
            starts=starts,
            lengths=lengths,
            pieces_per_row=np.ones(len(indices), dtype=np.int64),
            sequence_length=self.sequence_length,
            pad_id=self._pad_id,
        )

    def documents(self, index: int) -> list[DocumentPart]:
        """See `InstanceDataset`; all rows of a document name the same one."""
        return self._index.parts(int(self._starts[index]), int(self._lengths[index]))


def _make(plan: Plan, folder: Path) -> PlanHeader:
    length, index = plan.sequence_length, DocumentIndex(plan.prepared, plan.split)
    index.verify()
    num_documents = cut_documents = num_rows = 0
    for _, lengths in index.blocks():
        num_documents += int(np.count_nonzero(lengths))
        cut_documents += int(np.count_nonzero(lengths > length))
        num_rows += int((-(-lengths // length)).sum())
    all_starts = create_array(folder, "starts", num_rows, np.uint64)
    all_lengths = create_array(folder, "lengths", num_rows, np.min_scalar_type(length))
    done = 0
    for starts, lengths in index.windows(length):
        all_starts[done : done + len(starts)] = starts
        all_lengths[done : done + len(starts)] = lengths
        done += len(starts)
    for array in (all_starts, all_lengths):
        if isinstance(array, np.memmap):
            array.flush()
    return PlanHeader(
        kind=plan.kind,
        split=plan.split,
        sequence_length=length,
        fingerprint=plan.fingerprint,
        num_instances=num_rows,
        num_documents=num_documents,
        num_tokens=index.num_tokens,
        efficiency=index.num_tokens / (num_rows * length),
        cut_documents=cut_documents,
    )
