"""Parts of token files, one after the other, become the files of a data set."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from toolkit.data.tokens.duplicates import Duplicates
from toolkit.data.tokens.parts import COPY_BYTES, SPLITS, Part, part_path, read_blocks
from toolkit.data.tokens.prepared import NUM_BLOCKS, SplitInfo, hash_blocks


def join_parts(
    parts_folder: Path,
    parts: list[Part],
    output: Path,
    *,
    itemsize: int,
    duplicates: Duplicates | None,
) -> dict[str, SplitInfo]:
    """Write `{split}.bin`, `.idx` and, where any part has one, `.mask` into `output`.

    The order is that of shards; documents that `duplicates` names are left out.

    Returns:
        Counts and hashes of the splits that hold at least one token.
    """
    splits = {}
    for split in SPLITS:
        joined = _JoinedSplit(output, split, parts, itemsize)
        try:
            for index in range(len(parts)):
                drop = duplicates.of(index, split) if duplicates is not None else None
                joined.append(parts_folder, index, drop)
        finally:
            joined.close()
        info = joined.info(duplicates.text_bytes[split] if duplicates is not None else 0)
        if info is not None:
            splits[split] = info
    return splits


def joined_bytes(
    parts_folder: Path, parts: list[Part], *, itemsize: int, duplicates: Duplicates | None
) -> int:
    """Bytes of the files that `join_parts` will write."""
    total = 0
    for split in SPLITS:
        has_mask = any(part.splits[split].mask_hash is not None for part in parts)
        drops_last = False
        for index, part in enumerate(parts):
            stats = part.splits[split]
            num_tokens, num_documents = stats.num_tokens, stats.num_documents
            if duplicates is not None:
                path = part_path(parts_folder, index, f"{split}.idx")
                drop = duplicates.of(index, split)
                bounds, keep = _documents(path, num_tokens, drop, drops_last)
                drops_last = not keep[-1]
                num_tokens, num_documents = int((np.diff(bounds) * keep).sum()), int(keep[1:].sum())
            total += num_tokens * (itemsize + has_mask) + num_documents * 8
    return total


class _File:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hasher = xxhash.xxh3_128()

    def write(self, data: bytes) -> None:
        self._hasher.update(data)
        self._file.write(data)

    def close(self) -> None:
        self._file.close()

    @property
    def content_hash(self) -> str:
        return self._hasher.hexdigest()


class _JoinedSplit:
    def __init__(self, output: Path, split: str, parts: list[Part], itemsize: int) -> None:
        self._split, self._parts, self._itemsize = split, parts, itemsize
        self._tokens = _File(output / f"{split}.bin")
        self._index = _File(output / f"{split}.idx")
        has_mask = any(part.splits[split].mask_hash is not None for part in parts)
        self._mask = _File(output / f"{split}.mask") if has_mask else None
        self._num_tokens = self._num_documents = self._num_targets = 0
        self._drops_last = False

    def append(self, folder: Path, index: int, drop: np.ndarray | None) -> None:
        """One part; `drop`: which of the documents that start in it are left out."""
        part = self._parts[index].splits[self._split]
        path = part_path(folder, index, f"{self._split}.idx")
        bounds, keep = _documents(path, part.num_tokens, drop, self._drops_last)
        self._drops_last = not keep[-1]
        lengths = np.diff(bounds) * keep
        new_starts = self._num_tokens + np.cumsum(lengths) - lengths
        self._index.write(new_starts[1:][keep[1:]].astype(np.uint64).tobytes())
        self._num_documents += int(keep[1:].sum())
        for start, end in _runs(bounds, keep):
            self._copy(folder, index, start, end)
        self._num_tokens += int(lengths.sum())

    def close(self) -> None:
        for file in (self._tokens, self._index, self._mask):
            if file is not None:
                file.close()

    def info(self, dropped_text_bytes: int) -> SplitInfo | None:
        """Counts and hashes; None (and no files) when there is no token."""
        if self._num_tokens == 0:
            for file in (self._tokens, self._index, self._mask):
                if file is not None:
                    os.unlink(file.path)
            return None
        assert self._tokens.path.stat().st_size == self._num_tokens * self._itemsize
        blocks = hash_blocks(self._tokens.path)
        text_bytes = sum(part.splits[self._split].text_bytes for part in self._parts)
        return SplitInfo(
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            text_bytes=max(0, text_bytes - dropped_text_bytes),
            content_hash=self._tokens.content_hash,
            block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
            index_hash=self._index.content_hash,
            mask_hash=self._mask.content_hash if self._mask is not None else None,
            num_targets=self._num_targets if self._mask is not None else None,
        )

    def _copy(self, folder: Path, index: int, start: int, end: int) -> None:
        tokens = part_path(folder, index, f"{self._split}.bin")
        for data in read_blocks(tokens, start * self._itemsize, end * self._itemsize):
            self._tokens.write(data)
        if self._mask is None:
            return
        if self._parts[index].splits[self._split].mask_hash is None:
            for first in range(start, end, COPY_BYTES):
                self._mask.write(b"\x01" * min(COPY_BYTES, end - first))
            self._num_targets += end - start
            return
        for data in read_blocks(part_path(folder, index, f"{self._split}.mask"), start, end):
            self._mask.write(data)
            self._num_targets += data.count(1)


def _documents(
    index: Path, num_tokens: int, drop: np.ndarray | None, drops_last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the documents of a part, and which of them stay. What stands before its first start
    comes first: it goes on with the last document of the parts before."""
    starts = np.fromfile(index, dtype=np.uint64)
    bounds = np.concatenate([[0], starts.astype(np.int64), [num_tokens]])
    keep = np.ones(len(starts) + 1, dtype=bool)
    keep[0] = not drops_last
    if drop is not None:
        keep[1:] = ~drop
    return bounds, keep


def _runs(bounds: np.ndarray, keep: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of tokens to copy: neighbours that are kept are one range."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return [
        (int(bounds[first]), int(bounds[last]))
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    ]
