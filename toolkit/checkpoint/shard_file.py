"""A file of shards: each as `torch.save` writes it, hashed on the way to the disk.

`torch.save` takes half a millisecond and forty small writes for a tensor of any size, mostly under
Python's lock. What it writes around the numbers depends on type and shape alone, so it is asked
once for each of those; the numbers of all other shards go to the file straight from their memory.
"""

import functools
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import xxhash
from torch.serialization import get_crc32_options, set_crc32_options

from toolkit.checkpoint.folder import FileEntry
from toolkit.storage.atomic import reserve_space, start_writing

_HELD_BYTES = 1 << 20
"""Passed on at once: so little that the processor's cache still holds what was hashed when it is
written."""
_SMALL_BYTES = 64 << 10
"""Pieces below this wait for one another, so that the system is not called for each."""
_START_BYTES = 8 << 20
"""Written between two requests to the disk."""

_lock = threading.Lock()
"""On torch's setting for checksums, which all threads share."""


class Frame(NamedTuple):
    """What `torch.save` writes around the numbers of a tensor."""

    head: bytes
    tail: bytes


def bytes_in(dtype: torch.dtype, shape: torch.Size) -> int:
    """Bytes of the numbers of a tensor."""
    return shape.numel() * dtype.itemsize


def framed_bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    """The same with the frame."""
    return bytes_in(dtype, shape) + sum(map(len, frame_of(dtype, shape)))


@functools.lru_cache(maxsize=4096)
def frame_of(dtype: torch.dtype, shape: torch.Size) -> Frame:
    """The frame of contiguous CPU tensors that use the whole of their memory."""
    nbytes = bytes_in(dtype, shape)
    tensor = torch.empty(shape, dtype=dtype) if not nbytes else _untouched(nbytes, dtype, shape)
    recorder = _Recorder(tensor.data_ptr() if nbytes else None)
    with _lock:
        before = get_crc32_options()
        set_crc32_options(False)  # the manifest's hashes cover all files
        try:
            torch.save(tensor, recorder)  # type: ignore[arg-type]
        finally:
            set_crc32_options(before)
    return Frame(bytes(recorder.before), bytes(recorder.after))


class ShardFile:
    """A new file of shards, whose sizes are known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._started = 0
        """Bytes that the disk was asked to take."""
        self._held = bytearray()
        self._digest = xxhash.xxh3_64()

    @classmethod
    @contextmanager
    def open(cls, path: Path, size: int) -> Iterator["ShardFile"]:
        """The file `path` of `size` bytes to come; raises OSError where the disk has no room."""
        with path.open("wb", buffering=0) as file:
            reserve_space(file.fileno(), size)
            yield cls(file)

    def add(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Write a CPU tensor; where it begins, and its bytes with the frame."""
        begin = self._size
        frame = frame_of(tensor.dtype, tensor.shape)
        self._write(memoryview(frame.head))
        self._write(bytes_of(tensor.contiguous()))
        self._write(memoryview(frame.tail))
        return begin, self._size - begin

    def sync(self) -> None:
        """Make all that was written durable."""
        self._flush()
        os.fsync(self._file.fileno())

    def entry(self) -> FileEntry:
        """Size and hash of what was synced."""
        return FileEntry(self._size, self._digest.hexdigest())

    def _write(self, view: memoryview) -> None:
        self._size += len(view)
        if len(view) < _SMALL_BYTES:
            self._held += view
            if len(self._held) > _HELD_BYTES:
                self._flush()
        else:
            self._flush()
            self._pass_on(view)

    def _flush(self) -> None:
        if self._held:
            self._pass_on(memoryview(self._held))
            self._held = bytearray()

    def _pass_on(self, view: memoryview) -> None:
        for begin in range(0, len(view), _HELD_BYTES):
            part = view[begin : begin + _HELD_BYTES]
            self._digest.update(part)
            while len(part):  # an unbuffered file may take less than it is given
                part = part[self._file.write(part) :]
            written = self._file.tell()
            if written - self._started >= _START_BYTES:
                start_writing(self._file.fileno(), self._started, written - self._started)
                self._started = written


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class _Recorder:
    """As much of a binary file as `torch.save` uses, that keeps all but the bytes at `address`."""

    def __init__(self, address: int | None) -> None:
        self._address = address
        self.before = self._current = bytearray()
        self.after = bytearray()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._address is not None and _address_of(view) == self._address:
            self._current = self.after
        else:
            self._current += view
        return len(view)

    def flush(self) -> None:
        pass


def _untouched(nbytes: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """A tensor in memory that nobody touches, so that the system never provides it."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).view(dtype).view(shape)


def _address_of(view: memoryview) -> int:
    return np.frombuffer(view, dtype=np.uint8).ctypes.data if len(view) else 0
