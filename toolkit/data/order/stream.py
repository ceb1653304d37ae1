"""An endless stream of instances, readable at any position."""

from typing import Protocol

import numpy as np

from toolkit.data.order.permutation import KeyedPermutation


class InstanceStream(Protocol):
    """Position p of the stream holds one instance; which one is computed, in constant time and
    memory, from p and a key that comes from (fingerprint, seed).

    `epoch_instances` positions are one pass over the data.
    """

    @property
    def epoch_instances(self) -> int:
        """Instances of one epoch: positions [e * epoch_instances, (e + 1) * epoch_instances)."""

    @property
    def keeps_epochs_apart(self) -> bool:
        """Whether a batch may not span two epochs (the rest of an epoch is dropped then)."""

    @property
    def end(self) -> int | None:
        """The first position that cannot be read; None: there is always more."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the instances at ascending `positions`, shape `(count,)`, int64."""


class ShuffledStream:
    """Every epoch is a permutation of its own over all instances of one data set."""

    keeps_epochs_apart = True
    end = None

    def __init__(self, num_instances: int, *, fingerprint: str, seed: int, shuffle: bool) -> None:
        self.epoch_instances = num_instances
        self._key = f"{fingerprint}:{seed}"
        self._shuffle = shuffle

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """See `InstanceStream`."""
        epochs, places = np.divmod(positions, self.epoch_instances)
        if not self._shuffle or not len(places):
            return places
        first, last = int(epochs[0]), int(epochs[-1])
        pieces = [self._permute(epoch, places[epochs == epoch]) for epoch in range(first, last + 1)]
        return pieces[0] if first == last else np.concatenate(pieces)

    def _permute(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return KeyedPermutation(self.epoch_instances, f"{self._key}:{epoch}")(places)
