"""Which instances make up global batch n.

A stream of instances is cut into batches of equal size. Where the size changes in the middle of a
run, a new segment begins with the next unused instance. So the position of training is the number
of a batch and a short list of segments, and any batch is found in constant time.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from toolkit.data.order.stream import InstanceStream
from toolkit.errors import ConfigError


class Segment(NamedTuple):
    """Batches of one size."""

    first_batch: int
    position: int
    """Stream position of its first instance."""
    batch_instances: int


class BatchOrder(Protocol):
    """Instances of every global batch, a pure function of (fingerprint, seed, batch number)."""

    segments: tuple[Segment, ...]
    """Where the size of batches changed; at least the first one."""
    steps_per_epoch: int
    """Whole global batches in one pass over the data."""
    is_uniform: bool
    """Whether all rows of all batches have the same length."""
    dropped_instances: int
    """Instances that one epoch leaves out."""
    settings: str
    """What else than instances, seed and sizes decides the order; "" for nothing."""

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        """Instances of global batches [first_batch, first_batch + num_batches), of one segment.

        Time and memory depend on `num_batches` only. Shape `(num_batches, batch_instances)`.
        """

    def batches_in_segment(self, first_batch: int, num_batches: int) -> int:
        """How many of these batches have the size of the first and can be read; at least one."""

    def epoch_end(self, epochs: int) -> int:
        """Number of batches until `epochs` passes over the data are done."""

    def epoch_of(self, batch: int) -> tuple[int, int]:
        """(epoch, number in it) of a batch, both from 0."""

    def epochs_done(self, batches: int) -> float:
        """Passes over the data that the first `batches` batches are."""

    def resized(
        self, segments: Sequence[Segment], batch: int, batch_instances: int
    ) -> "BatchOrder":
        """This order with the history `segments`, and batches of `batch_instances` from number
        `batch` on. ConfigError: this kind of order takes one size only."""


class StreamBatches:
    """A `BatchOrder` of batches cut from an `InstanceStream`."""

    is_uniform = True
    settings = ""

    def __init__(self, stream: InstanceStream, segments: Sequence[Segment]) -> None:
        self.stream = stream
        self.segments = tuple(segments)
        # Of the last batch size.
        self.steps_per_epoch, rest = divmod(stream.epoch_instances, segments[-1].batch_instances)
        self.dropped_instances = rest if stream.keeps_epochs_apart else 0

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        size = self._segment(first_batch).batch_instances
        starts = self._starts(first_batch, num_batches)
        positions = (starts[:, None] + np.arange(size)).reshape(-1)
        return self.stream.indices(positions).reshape(num_batches, size)

    def batches_in_segment(self, first_batch: int, num_batches: int) -> int:
        later = [s.first_batch for s in self.segments if s.first_batch > first_batch]
        count = min([num_batches, *(start - first_batch for start in later)])
        if self.stream.end is None:
            return count
        size = self._segment(first_batch).batch_instances
        ends = self._starts(first_batch, count) + size
        # What cannot be read is asked for by itself, and says why.
        return max(1, int((ends <= self.stream.end).sum()))

    def position(self, batch: int) -> int:
        """Stream position of the first instance of `batch`."""
        segment = self._segment(batch)
        size, total = segment.batch_instances, self.stream.epoch_instances
        number = batch - segment.first_batch
        epoch, whole = self._first_epoch(segment)
        if number < whole or not self.stream.keeps_epochs_apart:
            return segment.position + number * size
        later, place = divmod(number - whole, total // size)
        return (epoch + 1 + later) * total + place * size

    def next_position(self, batch: int) -> int:
        """Stream position after the last instance that batches before `batch` used."""
        if batch == 0:
            return 0
        return self.position(batch - 1) + self._segment(batch - 1).batch_instances

    def epochs_done(self, batches: int) -> float:
        """Whole numbers where no whole batch of an epoch is left."""
        total, used = self.stream.epoch_instances, self.next_position(batches)
        if not self.stream.keeps_epochs_apart or batches == 0:
            return used / total
        segment = self._segment(batches - 1)
        epoch = (used - 1) // total
        first_epoch, whole = self._first_epoch(segment)
        end = total - total % segment.batch_instances
        if epoch == first_epoch:
            end = segment.position + whole * segment.batch_instances - epoch * total
        return epoch + (used - epoch * total) / end

    def epoch_end(self, epochs: int) -> int:
        last, total = self.segments[-1], self.stream.epoch_instances
        if not self.stream.keeps_epochs_apart:
            left = epochs * total - last.position
            return last.first_batch + max(0, left // last.batch_instances)
        first_epoch, whole = self._first_epoch(last)
        if epochs <= first_epoch:
            return last.first_batch
        per_epoch = total // last.batch_instances
        return last.first_batch + whole + (epochs - first_epoch - 1) * per_epoch

    def epoch_of(self, batch: int) -> tuple[int, int]:
        epoch, place = divmod(self.position(batch), self.stream.epoch_instances)
        return epoch, place // self._segment(batch).batch_instances

    def resized(
        self, segments: Sequence[Segment], batch: int, batch_instances: int
    ) -> "StreamBatches":
        before = StreamBatches(self.stream, segments)
        if before.segments[-1].batch_instances == batch_instances:
            return before
        kept = [s for s in before.segments if s.first_batch < batch]
        added = Segment(batch, before.next_position(batch), batch_instances)
        return StreamBatches(self.stream, [*kept, added])

    def _segment(self, batch: int) -> Segment:
        return next(s for s in reversed(self.segments) if s.first_batch <= batch)

    def _first_epoch(self, segment: Segment) -> tuple[int, int]:
        """(number of the epoch a segment begins in, whole batches of it that are left)."""
        epoch, used = divmod(segment.position, self.stream.epoch_instances)
        return epoch, (self.stream.epoch_instances - used) // segment.batch_instances

    def _starts(self, first_batch: int, count: int) -> np.ndarray:
        return np.array([self.position(n) for n in range(first_batch, first_batch + count)])


def instances_per_batch(global_batch_size: int, sequence_length: int, world_size: int) -> int:
    """Rows of a global batch. ConfigError: they do not divide into the data-parallel ranks."""
    unit = sequence_length * world_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit} or {2 * unit}"
        raise ConfigError(
            f"data_loader.global_batch_size {global_batch_size} is not divisible by "
            f"dataset.sequence_length {sequence_length} x {world_size} data-parallel ranks = "
            f"{unit}; the nearest sizes that work are {nearest}"
        )
    return global_batch_size // sequence_length


def steps_until(
    order: BatchOrder, value: int, unit: Literal["steps", "tokens", "epochs"], sequence_length: int
) -> int:
    """Number of the step that ends a duration, counted from the beginning of the run; batches may
    have had several sizes."""
    if unit == "steps":
        return value
    if unit == "epochs":
        return order.epoch_end(value)
    last, instances = order.segments[-1], -(-value // sequence_length)
    before = sum(
        (after.first_batch - segment.first_batch) * segment.batch_instances
        for segment, after in itertools.pairwise(order.segments)
    )
    return last.first_batch + max(0, -(-(instances - before) // last.batch_instances))
