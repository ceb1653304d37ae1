"""A keyed permutation of [0, n): a shuffle that is computed, not stored.

A Feistel network is a bijection of [0, 4**k) for any round function (Luby & Rackoff 1988). With
4**k >= n, applying it again while the result is >= n ("cycle walking", Black & Rogaway 2002) gives
a bijection of [0, n). 4**k < 4 n, so an index takes fewer than four passes on average, whatever n
is: constant time and memory for 1e6 or 1e12 instances.
"""

import numpy as np
import xxhash

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
