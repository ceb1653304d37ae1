"""One document a row, padded; for evaluation."""

from pathlib import Path

import numpy as np

from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.planned import PlannedInstances
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

    def _pieces(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts = self._starts[indices].astype(np.int64)
        lengths = self._lengths[indices].astype(np.int64)
        return starts, lengths, np.ones(len(indices), dtype=np.int64)


def _make(plan: Plan, folder: Path) -> PlanHeader:
    length, index = plan.sequence_length, DocumentIndex(plan.prepared, plan.split)
    index.verify()
    num_rows = sum(int((-(-lengths // length)).sum()) for _, lengths in index.blocks())
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
    return plan.describe(index.blocks(), index.num_tokens, num_rows)
