"""The files of one split of a new data set, counted and hashed while they are written."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from toolkit.data.tokens.prepared import NUM_BLOCKS, Split, SplitInfo, TokenDType, hash_blocks


class HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path, *, bits: int = 128) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hasher = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._hasher.update(data)
        self._file.write(data)

    def close(self) -> str:
        """Close the file; returns the hash of its content."""
        self._file.close()
        return self._hasher.hexdigest()


class SplitFiles:
    """`{split}.bin`, `.idx` and, where asked for, `.mask`.

    Attributes:
        text_bytes: UTF-8 bytes of the text of what was appended; whoever appends counts them.
        has_mask: whether there is a mask.
    """

    def __init__(self, folder: Path, split: Split, dtype: TokenDType, *, has_mask: bool) -> None:
        self.split: Split = split
        self.has_mask = has_mask
        self.text_bytes = 0
        self.num_tokens = self.num_documents = self._num_targets = 0
        self._dtype = np.dtype(dtype)
        self._tokens = HashedFile(folder / f"{split}.bin")
        self._index = HashedFile(folder / f"{split}.idx")
        self._mask = HashedFile(folder / f"{split}.mask") if has_mask else None

    def append(
        self,
        ids: np.ndarray,
        targets: np.ndarray | None,
        lengths: np.ndarray,
        starting: np.ndarray,
    ) -> None:
        """Add tokens.

        Args:
            ids: shape `(num_tokens,)`.
            targets: which of them the loss asks for, uint8 of the same shape; None: all.
            lengths: how many of them each document has, shape `(num_documents,)`.
            starting: which of these documents begin here, bool of the same shape.
        """
        places = self.num_tokens + np.cumsum(lengths) - lengths
        self.append_starts(places[starting])
        self.append_tokens(np.ascontiguousarray(ids.astype(self._dtype, copy=False)).data)
        if self.has_mask:
            if targets is None:
                targets = np.ones(len(ids), dtype=np.uint8)
            self.append_targets(np.ascontiguousarray(targets).data)

    def append_starts(self, starts: np.ndarray) -> None:
        """Documents that start at these tokens of the new file."""
        self._index.write(starts.astype(np.uint64).data)
        self.num_documents += len(starts)

    def append_tokens(self, data: bytes | memoryview) -> None:
        """Ids as they stand in the file."""
        self._tokens.write(data)
        self.num_tokens += memoryview(data).nbytes // self._dtype.itemsize

    def append_targets(self, data: bytes | memoryview) -> None:
        """Ones for tokens that the loss asks for, zeros for the others."""
        assert self._mask is not None
        self._mask.write(data)
        self._num_targets += int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8)))

    def close(self) -> None:
        """Close the files."""
        for file in self._files():
            file.close()

    def finish(self) -> SplitInfo | None:
        """Counts and hashes; None, and no files, when there is no token."""
        self.close()
        if self.num_tokens == 0:
            for file in self._files():
                os.unlink(file.path)
            return None
        path = self._tokens.path
        assert path.stat().st_size == self.num_tokens * self._dtype.itemsize
        blocks = hash_blocks(path)
        return SplitInfo(
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            text_bytes=self.text_bytes,
            content_hash=self._tokens.close(),
            block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
            index_hash=self._index.close(),
            mask_hash=self._mask.close() if self._mask is not None else None,
            num_targets=self._num_targets if self.has_mask else None,
        )

    def _files(self) -> list[HashedFile]:
        files = [self._tokens, self._index, self._mask]
        return [file for file in files if file is not None]
