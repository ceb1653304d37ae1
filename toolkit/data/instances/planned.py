"""Rows that follow a plan, and the simplest of them: padded ones."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.instances.base import Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.plans import Plan, PlanHeader, ensure_plan, plan_of
from toolkit.data.instances.rows import Pieces, TokenRows, gather_rows
from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.data.tokens.units import DOCUMENTS


class PlannedInstances(TokenRows):
    """Base of packed, padded and variable instances.

    Attributes:
        header: counts, and the share of positions filled.
        units_per_row: the most units that a row holds; 0 where documents form none.
    """

    units_per_row = 0

    def __init__(self, plan: Plan, make: Callable[[Plan, DocumentIndex, Path], PlanHeader]) -> None:
        """`make` writes the plan's arrays into a folder, where they are not there yet. DataError:
        the token files or their plan are damaged, or the plan cannot be written."""
        super().__init__(plan.prepared, plan.split, plan.sequence_length, plan.fingerprint)
        self._plan, index = plan, self.index

        def make_checked(folder: Path) -> PlanHeader:
            index.verify()
            return make(plan, index, folder)

        self.header = ensure_plan(plan, make_checked)
        self.num_instances = self.header.num_instances
        self._starts = self._array("starts")

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.asarray(np.load(self._plan.folder / f"{name}.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise self._plan.damaged(f"{name}.npy: {error}") from None

    def read(self, indices: np.ndarray) -> Rows:
        """Padding has the id of the end-of-document token, or 0."""
        pieces = self.pieces(np.asarray(indices))
        self._pages.request(*pieces[:2])
        units: Rows = {}
        if self.index.unit is not None:
            pieces, numbers = documents_of_units(self.index, pieces, self.units_per_row)
            units = {"units": numbers}
        rows = gather_rows(
            self._tokens,
            self._targets,
            pieces,
            sequence_length=self.sequence_length,
            pad_id=self._prepared.manifest.eos_id or 0,
            keep_kinds=bool(units),
        )
        return {**rows, **units}


def describe(plan: Plan, index: DocumentIndex, num_rows: int, **others: Any) -> PlanHeader:
    """The header of rows that hold all tokens, but for what `others` say."""
    num_documents = long_documents = dropped_tokens = 0
    for _, lengths in index.blocks():
        is_long = lengths > plan.sequence_length
        num_documents += int((lengths > 0).sum())
        long_documents += int(is_long.sum())
        dropped_tokens += int(lengths[is_long].sum())
    found: dict[str, Any] = {"num_tokens": index.num_tokens}
    if index.unit is not None:
        num_documents *= DOCUMENTS
        found = {
            "num_tokens": index.num_tokens - dropped_tokens,
            "dropped_tokens": dropped_tokens,
            "dropped_documents": DOCUMENTS * long_documents,
        }
        long_documents = 0  # which are cut
    filled = found["num_tokens"] / max(1, num_rows * plan.sequence_length)
    found = {"efficiency": filled, **found, **others}
    return PlanHeader(
        kind=plan.kind,
        split=plan.split,
        sequence_length=plan.sequence_length,
        fingerprint=plan.fingerprint,
        num_instances=num_rows,
        num_documents=num_documents,
        long_documents=long_documents,
        **found,
    )


def create_array(folder: Path, name: str, shape: int, dtype: "np.dtype | type") -> np.ndarray:
    """A new array of a plan to fill: a memory map whose place on disk is taken already (a full
    disk is an OSError here, where it would kill the process later)."""
    path = folder / f"{name}.npy"
    if shape == 0:
        np.save(path, np.empty(0, dtype))
        return np.empty(0, dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(shape,))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def fill(array: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
    """Write `blocks` into `array`, one after the other."""
    done = 0
    for block in blocks:
        array[done : done + len(block)] = block
        done += len(block)


def documents_of_units(
    index: DocumentIndex, pieces: Pieces, units_per_row: int
) -> tuple[Pieces, np.ndarray]:
    """The documents of `pieces`, which are units, and the numbers of the units of each row, int64
    `(rows, units_per_row)`; -1 where a row has fewer."""
    starts, lengths, units_of_row = pieces
    numbers, seconds = index.units_at(starts)
    split = np.stack([starts, seconds], axis=1)
    sizes = np.stack([seconds - starts, starts + lengths - seconds], axis=1)
    found = np.full((len(units_of_row), units_per_row), -1, dtype=np.int64)
    found[np.arange(units_per_row) < units_of_row[:, None]] = numbers
    return (split.reshape(-1), sizes.reshape(-1), units_of_row * DOCUMENTS), found


class PaddedDataset(PlannedInstances):
    """One document, or unit, a row, padded, in the order of documents; for evaluation.

    A document longer than `sequence_length` takes several rows that follow each other, without
    overlap: every token is in exactly one row. What a later row predicts knows nothing of the rows
    before it. Empty documents have no row.
    """

    def __init__(self, prepared: PreparedDataset, split: Split, sequence_length: int) -> None:
        super().__init__(plan_of(prepared, split, "padded", sequence_length), _make_padded)
        self._lengths = self._array("lengths")
        self.units_per_row = int(prepared.unit is not None)

    def pieces(self, indices: np.ndarray) -> Pieces:
        lengths = self._lengths[indices].astype(np.int64)
        return self._starts[indices].astype(np.int64), lengths, np.ones_like(lengths)


def _make_padded(plan: Plan, index: DocumentIndex, folder: Path) -> PlanHeader:
    length = plan.sequence_length
    num_rows = sum(len(lengths) for _, lengths in index.windows(length))
    starts = create_array(folder, "starts", num_rows, np.uint64)
    fill(starts, (window.starts for window in index.windows(length)))
    lengths = create_array(folder, "lengths", num_rows, np.min_scalar_type(length))
    fill(lengths, (window.lengths for window in index.windows(length)))
    return describe(plan, index, num_rows)
