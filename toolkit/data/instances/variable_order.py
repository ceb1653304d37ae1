"""In what order rows of different lengths are read: batches of one length, by a curriculum."""

import bisect
from collections.abc import Sequence
from typing import Literal

import numpy as np

from toolkit.data.instances.plans import Bucket
from toolkit.data.order.permutation import KeyedPermutation
from toolkit.errors import ConfigError, DataError

Curriculum = Literal["natural", "grow", "shrink"]


class VariableOrder:
    """Which instances make up global batch n, a pure function of (fingerprint, seed, n) and the
    settings, in constant time and memory.

    A batch has rows of one length, as many as `global_batch_size` tokens give. In each epoch, the
    rows of a bucket are permuted anew and cut into batches; those that do not fill a last batch are
    left out, other ones in each epoch. How batches of different lengths follow each other:

        natural   at random
        grow      in each of `num_cycles` cycles from the shortest to the longest
        shrink    in each cycle from the longest to the shortest

    Cycles get equal shares of each bucket's batches, to within one. There are at most as many
    cycles as batches.

    Attributes:
        steps_per_epoch: whole global batches in one pass over the data.
        dropped_instances: instances that one epoch leaves out.
        dropped_tokens: their tokens.
        settings: the curriculum, in a word or two.
    """

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
    ) -> None:
        """
        Args:
            buckets: lengths and numbers of instances (`VariableDataset.buckets`).
            global_batch_size: tokens of each batch.
            shuffle: False: rows of each bucket in file order, and with `natural` the buckets one
                after the other; every epoch the same.

        Raises:
            ConfigError: `global_batch_size` is not a multiple of every length.
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
        self.steps_per_epoch = sum(self._batches)
        if self.steps_per_epoch == 0:
            have = ", ".join(f"{b.num_instances:,} of {b.length}" for b in buckets) or "none"
            raise DataError(
                f"not enough data for one batch of data_loader.global_batch_size "
                f"{global_batch_size}: no row length has that many tokens (rows: {have}); make it "
                "or dataset.instances.min_sequence_length smaller, or give more text"
            )
        dropped = [
            bucket.num_instances - batches * rows
            for bucket, batches, rows in zip(buckets, self._batches, self._rows, strict=True)
        ]
        self.dropped_instances = sum(dropped)
        self.dropped_tokens = sum(
            number * bucket.length for number, bucket in zip(dropped, buckets, strict=True)
        )
        self.settings = curriculum if curriculum == "natural" else f"{curriculum} x {num_cycles}"
        self._key = f"{fingerprint}:{seed}"
        self._curriculum = curriculum
        self._num_cycles = min(num_cycles, self.steps_per_epoch)
        self._shuffle = shuffle

    def batch(self, n: int) -> np.ndarray:
        """Instances of global batch n (from 0, over epochs without end), `(rows,)`, int64."""
        epoch, place = divmod(n, self.steps_per_epoch)
        number, batch = self._locate(epoch, place)
        bucket, rows = self._buckets[number], self._rows[number]
        places = np.arange(batch * rows, (batch + 1) * rows)
        if self._shuffle:
            key = f"{self._key}:{epoch}:{bucket.length}"
            places = KeyedPermutation(bucket.num_instances, key)(places)
        return bucket.first + places

    def length_of_batch(self, n: int) -> int:
        """Tokens of each row of global batch n."""
        number, _ = self._locate(*divmod(n, self.steps_per_epoch))
        return self._buckets[number].length

    def _locate(self, epoch: int, place: int) -> tuple[int, int]:
        """(bucket, number of the batch in its bucket) of the batch at `place` in an epoch."""
        if self._curriculum == "natural":
            if self._shuffle:
                permutation = KeyedPermutation(self.steps_per_epoch, f"{self._key}:{epoch}")
                place = int(permutation(np.array([place]))[0])
            starts = [0] * len(self._buckets)
            sizes = self._batches
            numbers = range(len(self._buckets))
        else:
            # The last cycle that starts at or before `place`.
            cycle = bisect.bisect_right(range(self._num_cycles), place, key=self._cycle_start) - 1
            place -= self._cycle_start(cycle)
            starts = [self._share(batches, cycle) for batches in self._batches]
            sizes = [
                self._share(batches, cycle + 1) - start
                for batches, start in zip(self._batches, starts, strict=True)
            ]
            numbers = range(len(self._buckets))
            if self._curriculum == "shrink":
                numbers = numbers[::-1]
        for number in numbers:
            if place < sizes[number]:
                return number, starts[number] + place
            place -= sizes[number]
        raise AssertionError("place is outside of the epoch")

    def _cycle_start(self, cycle: int) -> int:
        """Batches of an epoch before `cycle`."""
        return sum(self._share(batches, cycle) for batches in self._batches)

    def _share(self, batches: int, cycle: int) -> int:
        """How many of a bucket's batches come before `cycle`."""
        return batches * cycle // self._num_cycles
