"""Asking the operating system for rows before they are read.

Rows in random order are the worst case of a memory map: each touches pages that are not in memory,
waits for them, and has a hundred neighbours read along. Told beforehand, the system fetches the
pages of all rows of a batch at once, and no others.
"""

import mmap

import numpy as np

SMALLEST_BYTES = 512
"""Shorter stretches are not asked for: a request costs as much as copying them."""


class Pages:
    """Pages of a memory-mapped array of one dimension; of other arrays, nothing."""

    def __init__(self, array: np.ndarray) -> None:
        self._itemsize = array.itemsize
        self._map = _map_of(array) if hasattr(mmap, "MADV_WILLNEED") else None
        self._first = 0
        if self._map is not None:
            whole = np.frombuffer(self._map, dtype=np.uint8)
            self._first = array.__array_interface__["data"][0] - whole.ctypes.data

    def request(self, starts: np.ndarray, num_items: np.ndarray | int) -> None:
        """Fetch `num_items` items from each of `starts` on, without waiting for them."""
        if self._map is None:
            return
        num_bytes = np.broadcast_to(num_items, starts.shape) * self._itemsize
        is_long = num_bytes >= SMALLEST_BYTES
        first = self._first + starts[is_long].astype(np.int64) * self._itemsize
        pages = first // mmap.PAGESIZE * mmap.PAGESIZE
        sizes = first - pages + num_bytes[is_long]
        advise, how = self._map.madvise, mmap.MADV_WILLNEED
        for page, size in zip(pages.tolist(), sizes.tolist(), strict=True):
            advise(how, page, size)


def _map_of(array: np.ndarray) -> mmap.mmap | None:
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "_mmap", None) or getattr(base, "base", None)
    return base
