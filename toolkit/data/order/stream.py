"""An endless stream of instances, readable at any position."""

from typing import Protocol

import numpy as np
import xxhash


class InstanceStream(Protocol):
    """Position p of the stream holds one instance; which one is computed, in constant time and
    memory, from p and a key that comes from (fingerprint, seed)."""

    epoch_instances: int
    """Instances of one epoch: positions [e * epoch_instances, (e + 1) * epoch_instances)."""
    keeps_epochs_apart: bool
    """Whether a batch may not span two epochs (the rest of an epoch is dropped then)."""

    @property
    def end(self) -> int | None:
        """The first position that cannot be read; None: there is always more."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the instances at ascending `positions`, shape `(count,)`, int64."""


class ShuffledStream:
    """An `InstanceStream`: every epoch is a permutation of its own over all instances."""

    keeps_epochs_apart = True
    end = None

    def __init__(self, num_instances: int, *, fingerprint: str, seed: int, shuffle: bool) -> None:
        self.epoch_instances = num_instances
        self._key = f"{fingerprint}:{seed}"
        self._shuffle = shuffle

    def indices(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.epoch_instances)
        if not self._shuffle or not len(places):
            return places
        first, last = int(epochs[0]), int(epochs[-1])
        pieces = [
            KeyedPermutation(self.epoch_instances, f"{self._key}:{epoch}")(places[epochs == epoch])
            for epoch in range(first, last + 1)
        ]
        return pieces[0] if first == last else np.concatenate(pieces)


NUM_ROUNDS = 8
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


class KeyedPermutation:
    """The permutation of [0, `size`) that belongs to `key` (any text)."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._half_mask = np.uint64((1 << half_bits) - 1)
        self._round_keys = [
            np.uint64(xxhash.xxh3_64_intdigest(key.encode(), seed=number))
            for number in range(NUM_ROUNDS)
        ]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map positions in [0, size), any shape; int64 of the same shape."""
        values = self._feistel(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            walked = self._feistel(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.size]
        return values.astype(np.int64).reshape(positions.shape)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & self._half_mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea & Flood 2014; constants by Stafford)."""
    values = (values ^ (values >> _SHIFT_1)) * _MULTIPLIER_1
    values = (values ^ (values >> _SHIFT_2)) * _MULTIPLIER_2
    return values ^ (values >> _SHIFT_3)
