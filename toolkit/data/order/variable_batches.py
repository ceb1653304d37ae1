"""Batches of rows of one length each, in the order that a curriculum gives."""

from collections.abc import Sequence

import numpy as np

from toolkit.data.instances.variable_order import VariableOrder
from toolkit.data.order.batches import Segment
from toolkit.errors import ConfigError


class VariableBatches:
    """`VariableOrder` as a `BatchOrder`: its batches have one size, in tokens."""

    is_uniform = False

    def __init__(self, order: VariableOrder, batch_instances: int) -> None:
        """`batch_instances`: rows of the longest length in a batch."""
        self._order = order
        self.segments = (Segment(0, 0, batch_instances),)
        self.steps_per_epoch = order.steps_per_epoch
        self.dropped_instances = order.dropped_instances
        self.settings = order.settings

    def indices(self, first_batch: int, num_batches: int = 1) -> np.ndarray:
        """See `BatchOrder`; one batch at a time, as the next one's rows have another length."""
        assert num_batches == 1, "rows of several lengths are not read together"
        return self._order.batch(first_batch)[None]

    def batches_in_segment(self, first_batch: int, num_batches: int) -> int:
        """See `BatchOrder`."""
        return num_batches

    def epoch_end(self, epochs: int) -> int:
        """See `BatchOrder`."""
        return epochs * self.steps_per_epoch

    def epoch_of(self, batch: int) -> tuple[int, int]:
        """See `BatchOrder`."""
        return divmod(batch, self.steps_per_epoch)

    def epochs_done(self, batches: int) -> float:
        """See `BatchOrder`."""
        return batches / self.steps_per_epoch

    def resized(
        self, segments: Sequence[Segment], batch: int, batch_instances: int
    ) -> "VariableBatches":
        """See `BatchOrder`."""
        if [tuple(s) for s in segments] != [(0, 0, batch_instances)]:
            raise ConfigError(
                "data_loader.global_batch_size: cannot change in the middle of a run whose "
                "dataset.instances are of variable length; set it back, or start a new run with "
                "trainer.load_path"
            )
        return self
