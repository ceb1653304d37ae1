"""Documents cut into powers of two, one bucket of rows for each length.

Dataset decomposition (Pouransari et al. 2024, "Dataset Decomposition: Faster LLM Training with
Variable Sequence Length Curriculum"): a document of n tokens becomes as many rows of
`sequence_length` as fit, then one row for each power of two in what is left, the greatest first,
down to `min_sequence_length`. So every row is of one document, nothing is padded, and only rests
shorter than the shortest row are dropped. In what order rows are read:
`VariableOrder`.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from toolkit.data.instances.base import Rows
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.planned import PlannedInstances, create_array, describe, fill
from toolkit.data.instances.plans import Bucket, Plan, PlanHeader, plan_of
from toolkit.data.instances.rows import Pieces, TokenRows
from toolkit.data.order.batches import BatchOrder
from toolkit.data.order.plan import Phase, Segment
from toolkit.data.order.stream import KeyedPermutation
from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.errors import ConfigError, DataError

ORDERED_INSTANCES = 4096
"""Instances of a bucket whose order is computed at once: a few numbers cost as much as many."""


class VariableDataset(PlannedInstances):
    """Instances numbered bucket by bucket, from the shortest rows to the longest.

    Attributes:
        sequence_length: tokens of the longest rows.
        buckets: those that hold instances, by length.
        header: counts; `dropped_tokens` are the rests shorter than the shortest row.
    """

    def __init__(
        self, prepared: PreparedDataset, split: Split, sequence_length: int, *, min_length: int
    ) -> None:
        plan = plan_of(prepared, split, "variable", sequence_length, min_length=min_length)
        super().__init__(plan, functools.partial(_make, min_length=min_length))
        self.buckets = self.header.buckets
        self._firsts = np.array([bucket.first for bucket in self.buckets], dtype=np.int64)
        self._lengths = np.array([bucket.length for bucket in self.buckets], dtype=np.int64)

    def pieces(self, indices: np.ndarray) -> Pieces:
        lengths = self._lengths[np.searchsorted(self._firsts, indices, side="right") - 1]
        return self._starts[indices].astype(np.int64), lengths, np.ones_like(lengths)

    def read(self, indices: np.ndarray) -> Rows:
        """Rows of one bucket, of its length; ValueError: of several. Each is one sequence, so there
        are no `document_ids`."""
        _, lengths, _ = self.pieces(np.asarray(indices))
        if len(lengths) and lengths.min() != lengths.max():
            found = int(lengths.min()), int(lengths.max())
            raise ValueError(f"instances of one length can be read together, not of {found}")
        return TokenRows.read(self, indices)


def _make(plan: Plan, index: DocumentIndex, folder: Path, *, min_length: int) -> PlanHeader:
    longest = plan.sequence_length
    lengths_of_rows = [1 << bit for bit in range(min_length.bit_length() - 1, longest.bit_length())]
    counts = dict.fromkeys(lengths_of_rows, 0)
    dropped_tokens = dropped_documents = 0
    for _, lengths in index.blocks():
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
    starts = (_starts_of_rows(index, bucket.length, longest) for bucket in buckets)
    fill(create_array(folder, "starts", num_rows, np.uint64), itertools.chain.from_iterable(starts))
    return describe(
        plan,
        index,
        num_rows,
        num_tokens=index.num_tokens - dropped_tokens,
        efficiency=1.0 if num_rows else 0.0,
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


Curriculum = Literal["natural", "grow", "shrink"]


class VariableOrder(BatchOrder):
    """Batches of one size in tokens, each with rows of one length.

    In each epoch, the rows of a bucket are permuted anew and cut into batches; those that do not
    fill a last batch are left out. How batches of different lengths follow each other:

        natural   at random
        grow      in each of `num_cycles` cycles from the shortest to the longest
        shrink    in each cycle from the longest to the shortest

    Cycles get equal shares of each bucket's batches, to within one. There are at most as many
    cycles as batches.
    """

    is_uniform = False

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        global_batch_size: int,
        fingerprint: str,
        seed: int,
        curriculum: Curriculum = "grow",
        num_cycles: int = 8,
        shuffle: bool = True,
        batch_instances: int = 1,
    ) -> None:
        """`batch_instances` are rows of `dataset.sequence_length` tokens in a batch. Without
        `shuffle`, rows of each bucket come in file order, and with `natural` the buckets one after
        the other; every epoch the same.

        Raises:
            ConfigError: `global_batch_size` (tokens) is not a multiple of every length.
            DataError: no bucket fills a batch.
        """
        for bucket in buckets:
            if global_batch_size % bucket.length:
                raise ConfigError(
                    f"data_loader.global_batch_size {global_batch_size} is not divisible by rows "
                    f"of {bucket.length} tokens (dataset.instances of type variable); make it a "
                    "multiple of dataset.sequence_length"
                )
        self._buckets = list(buckets)
        self._rows = [global_batch_size // bucket.length for bucket in buckets]
        self._batches = [
            bucket.num_instances // rows for bucket, rows in zip(buckets, self._rows, strict=True)
        ]
        per_epoch = sum(self._batches)
        if per_epoch == 0:
            have = ", ".join(f"{b.num_instances:,} of {b.length}" for b in buckets) or "none"
            raise DataError(
                f"not enough data for one batch of data_loader.global_batch_size "
                f"{global_batch_size}: no row length has that many tokens (rows: {have}); make it "
                "or dataset.instances.min_sequence_length smaller, or give more text"
            )
        super().__init__(
            [Segment(0, 0, batch_instances)],
            epoch_instances=per_epoch * batch_instances,
            keeps_epochs_apart=True,
        )
        self.dropped_instances = sum(
            bucket.num_instances - batches * rows
            for bucket, batches, rows in zip(buckets, self._batches, self._rows, strict=True)
        )
        self.settings = curriculum if curriculum == "natural" else f"{curriculum} x {num_cycles}"
        self._key = f"{fingerprint}:{seed}"
        self._curriculum = curriculum
        num_cycles = 1 if curriculum == "natural" else num_cycles
        self._num_cycles = min(num_cycles, self.steps_per_epoch)
        self._shuffle = shuffle
        # At random, the batches of a bucket do not follow each other.
        together = 1 if curriculum == "natural" else ORDERED_INSTANCES
        self._together = [max(1, together // rows) for rows in self._rows]
        self._ordered: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def batch(self, n: int) -> np.ndarray:
        """Instances of global batch n (from 0, over epochs without end), `(rows,)`, int64."""
        epoch, place = divmod(n, self.steps_per_epoch)
        number, batch = self._locate(epoch, place)
        bucket, rows = self._buckets[number], self._rows[number]
        if not self._shuffle:
            return bucket.first + np.arange(batch * rows, (batch + 1) * rows)
        block, inside = divmod(batch, self._together[number])
        which, places = self._ordered.get(number, (None, np.empty(0, np.int64)))
        if which != (epoch, block):
            first = (batch - inside) * rows
            end = min(first + self._together[number] * rows, bucket.num_instances)
            key = f"{self._key}:{epoch}:{bucket.length}"
            places = KeyedPermutation(bucket.num_instances, key)(np.arange(first, end))
            self._ordered[number] = (epoch, block), places
        return bucket.first + places[inside * rows : (inside + 1) * rows]

    def length_of_batch(self, n: int) -> int:
        """Tokens of each row of global batch n."""
        number, _ = self._locate(*divmod(n, self.steps_per_epoch))
        return self._buckets[number].length

    def _locate(self, epoch: int, place: int) -> tuple[int, int]:
        """(bucket, number of the batch in its bucket) of the batch at `place` in an epoch."""
        if self._curriculum == "natural" and self._shuffle:
            permutation = KeyedPermutation(self.steps_per_epoch, f"{self._key}:{epoch}")
            place = int(permutation(np.array([place]))[0])
        # The last cycle that starts at or before `place`.
        cycles = range(self._num_cycles)
        cycle = bisect.bisect_right(cycles, place, key=lambda c: sum(self._before(c))) - 1
        before, after = self._before(cycle), self._before(cycle + 1)
        place -= sum(before)
        numbers = range(len(self._buckets))
        for number in reversed(numbers) if self._curriculum == "shrink" else numbers:
            size = after[number] - before[number]
            if place < size:
                return number, before[number] + place
            place -= size
        raise AssertionError("place is outside of the epoch")

    def _before(self, cycle: int) -> list[int]:
        """How many of each bucket's batches come before `cycle`."""
        return [batches * cycle // self._num_cycles for batches in self._batches]

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        """One batch at a time, as the next one's rows have another length."""
        assert num_batches == 1, "rows of several lengths are not read together"
        return self.batch(first_batch)[None]

    def batches_in_segment(self, first_batch: int, num_batches: int) -> int:
        return num_batches

    def epochs_done(self, batches: int) -> float:
        return batches / self.steps_per_epoch

    def continued(
        self, segments: Sequence[Segment], batch: int, phases: Sequence[Phase]
    ) -> "VariableOrder":
        if len(phases) > 1 or [*segments] != [Segment(0, 0, *phases[0][1:])]:
            raise ConfigError(
                "data_loader.global_batch_size: cannot change in the middle of a run whose "
                "dataset.instances are of variable length; set it back, or start a new run with "
                "trainer.load_path"
            )
        return self
