"""A stored file to read and seek in, without keeping it."""

import io
import os
from collections import OrderedDict

from toolkit.storage.remote import CHUNK, RemoteFolder

KEPT_BLOCKS = 4


class RemoteFile(io.RawIOBase):
    """Reads by ranges: long reads straight into the caller's buffer, several requests at a time;
    short ones through a few kept blocks, so that neighbours cost one request.

    Raises FileNotFoundError; see `RemoteFolder`.
    """

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self._folder = folder
        self._name = name
        self._size = folder.size(name)
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

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
        else:
            done = 0
            while done < count:
                number, offset = divmod(self._position + done, CHUNK)
                piece = self._block(number)[offset : offset + count - done]
                view[done : done + len(piece)] = piece
                done += len(piece)
        self._position += count
        return count

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            end = min((number + 1) * CHUNK, self._size)
            block = self._folder.read(self._name, number * CHUNK, end)
            self._blocks[number] = block
            if len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return block
