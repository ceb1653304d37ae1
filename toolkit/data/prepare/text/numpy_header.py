"""The header of a .npy file: where its numbers begin, how many there are, and of what type."""

import io
import math
from typing import NamedTuple

import numpy as np

from toolkit.errors import DataError

NUMPY_MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1 << 12
"""As much of a file as holds any header of an array of numbers."""


class NumpyHeader(NamedTuple):
    """What the header of a .npy file tells."""

    first_byte: int
    """Where the numbers begin."""
    num_values: int
    """Of all rows, where it has several."""
    dtype: np.dtype
    """Little-endian."""

    def disagreement(self, file_bytes: int) -> str | None:
        """What is wrong with a file of this size, or None."""
        size = file_bytes - self.first_byte
        if size == self.num_values * self.dtype.itemsize:
            return None
        return (
            f"its numpy header tells of {self.num_values} numbers, it holds "
            f"{size // self.dtype.itemsize}; the file is cut short or damaged"
        )


def read_numpy_header(head: bytes, path: str) -> NumpyHeader | None:
    """The header that `head`, the first `HEADER_BYTES` of the file `path`, begins with, if any.

    Raises:
        DataError: it cannot be read, or tells of numbers that do not lie one after the other in
            little-endian order.
    """
    if not head.startswith(NUMPY_MAGIC):
        return None
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read(stream)
    except (ValueError, KeyError, SyntaxError) as error:
        raise DataError(f"{path}: its numpy header cannot be read: {error}") from None
    if dtype.newbyteorder("<") != dtype:
        raise DataError(
            f"{path}: its numpy header says {dtype.str}: the numbers are big-endian; convert the "
            "file to little-endian"
        )
    if fortran_order and len(shape) > 1:
        raise DataError(f"{path}: its numbers are stored by columns; convert it to C order")
    return NumpyHeader(stream.tell(), math.prod(shape), dtype)
