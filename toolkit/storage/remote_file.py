"""A stored file to read and seek in, without keeping it."""

import io
import os
from typing import Any

from toolkit.storage.remote import CHUNK, RemoteFolder

KEPT_BLOCKS = 4


class RemoteFile(io.RawIOBase):
    """Reads by ranges: long reads straight into the caller's buffer, several requests at a time;
    short ones through a few kept blocks, so that neighbours cost one request.

    Raises FileNotFoundError; see `RemoteFolder`.
    """

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        from fsspec.caching import BlockCache

        self._folder = folder
        self._name = name
        self._size = size = folder.size(name)
        self._position = 0
        self._blocks: Any = BlockCache(
            CHUNK, lambda start, end: folder.read(name, start, min(end, size)), size, KEPT_BLOCKS
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: "bytearray | memoryview", /) -> int:  # type: ignore[override]
        """Fills all of `buffer`, unless the file ends before."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if count > CHUNK:
            self._folder.read_into(self._name, self._position, view[:count])
        elif count:
            view[:count] = self._blocks._fetch(self._position, self._position + count)
        self._position += count
        return count
