"""Which instances make up global batch n: the stream of instances, cut as a `BatchPlan` says."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from toolkit.data.order.plan import BatchPlan, Segment
from toolkit.data.order.stream import InstanceStream
from toolkit.errors import ConfigError


class BatchOrder(BatchPlan):
    """A `BatchPlan` that knows the instances of every global batch, a pure function of
    (fingerprint, seed, batch number)."""

    is_uniform: bool
    """Whether all instances have the same length."""
    settings: str
    """What else than instances, seed and sizes decides the order; "" for nothing."""

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        """Instances of global batches [first_batch, first_batch + num_batches), of one segment.

        Time and memory depend on `num_batches` only. Shape `(num_batches, batch_instances)`.
        """
        raise NotImplementedError

    def batches_in_segment(self, first_batch: int, num_batches: int) -> int:
        """How many of these batches have the size of the first and can be read; at least one."""
        raise NotImplementedError


class StreamBatches(BatchOrder):
    """Batches cut from an `InstanceStream`."""

    is_uniform = True
    settings = ""

    def __init__(self, stream: InstanceStream, segments: Sequence[Segment]) -> None:
        self.stream = stream
        super().__init__(
            segments,
            epoch_instances=stream.epoch_instances,
            keeps_epochs_apart=stream.keeps_epochs_apart,
        )

    def with_segments(self, segments: Sequence[Segment]) -> Self:
        return type(self)(self.stream, segments)

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        size = self.segment(first_batch).batch_instances
        starts = self._starts(first_batch, num_batches)
        positions = (starts[:, None] + np.arange(size)).reshape(-1)
        return self.stream.indices(positions).reshape(num_batches, size)

    def batches_in_segment(self, first_batch: int, num_batches: int) -> int:
        later = [s.first_batch for s in self.segments if s.first_batch > first_batch]
        count = min([num_batches, *(start - first_batch for start in later)])
        if self.stream.end is None:
            return count
        size = self.segment(first_batch).batch_instances
        ends = self._starts(first_batch, count) + size
        # What cannot be read is asked for by itself, and says why.
        return max(1, int((ends <= self.stream.end).sum()))

    def _starts(self, first_batch: int, count: int) -> np.ndarray:
        return np.array([self.position(n) for n in range(first_batch, first_batch + count)])


def check_batch_size(
    global_batch_size: int,
    sequence_length: int,
    world_size: int,
    key: str = "data_loader.global_batch_size",
) -> None:
    """Raise ConfigError where the rows of a global batch do not divide into the data-parallel
    ranks."""
    unit = sequence_length * world_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit} or {2 * unit}"
        raise ConfigError(
            f"{key} {global_batch_size} is not divisible by "
            f"dataset.sequence_length {sequence_length} x {world_size} data-parallel ranks = "
            f"{unit}; the nearest sizes that work are {nearest}"
        )
