"""Parts of token files, one after the other, become the files of a data set."""

from pathlib import Path

import numpy as np

from toolkit.data.prepare.build.duplicates import Duplicates
from toolkit.data.prepare.build.parts import COPY_BYTES, Part, part_path, read_blocks
from toolkit.data.prepare.build.split_files import SplitFiles
from toolkit.data.tokens.prepared import SPLITS, Split, SplitInfo, TokenDType


def join_parts(
    parts_folder: Path,
    parts: list[Part],
    output: Path,
    *,
    dtype: TokenDType,
    duplicates: Duplicates | None,
) -> dict[str, SplitInfo]:
    """Write `{split}.bin`, `.idx` and, where any part has one, `.mask` into `output`.

    The order is that of shards; documents that `duplicates` names are left out.

    Returns:
        Counts and hashes of the splits that hold at least one token.
    """
    splits: dict[str, SplitInfo] = {}
    for split in SPLITS:
        joined = _JoinedSplit(output, split, parts, dtype)
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
    parts_folder: Path, parts: list[Part], *, dtype: TokenDType, duplicates: Duplicates | None
) -> int:
    """Bytes of the files that `join_parts` will write."""
    total, itemsize = 0, np.dtype(dtype).itemsize
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


class _JoinedSplit:
    def __init__(self, output: Path, split: Split, parts: list[Part], dtype: TokenDType) -> None:
        self._split, self._parts, self._itemsize = split, parts, np.dtype(dtype).itemsize
        has_mask = any(part.splits[split].mask_hash is not None for part in parts)
        self._files = SplitFiles(output, split, dtype, has_mask=has_mask)
        self._files.text_bytes = sum(part.splits[split].text_bytes for part in parts)
        self._drops_last = False

    def append(self, folder: Path, index: int, drop: np.ndarray | None) -> None:
        """One part; `drop`: which of the documents that start in it are left out."""
        part = self._parts[index].splits[self._split]
        path = part_path(folder, index, f"{self._split}.idx")
        bounds, keep = _documents(path, part.num_tokens, drop, self._drops_last)
        self._drops_last = not keep[-1]
        lengths = np.diff(bounds) * keep
        new_starts = self._files.num_tokens + np.cumsum(lengths) - lengths
        self._files.append_starts(new_starts[1:][keep[1:]])
        for start, end in _runs(bounds, keep):
            self._copy(folder, index, start, end)

    def close(self) -> None:
        self._files.close()

    def info(self, dropped_text_bytes: int) -> SplitInfo | None:
        """Counts and hashes; None (and no files) when there is no token."""
        self._files.text_bytes = max(0, self._files.text_bytes - dropped_text_bytes)
        return self._files.finish()

    def _copy(self, folder: Path, index: int, start: int, end: int) -> None:
        tokens = part_path(folder, index, f"{self._split}.bin")
        for data in read_blocks(tokens, start * self._itemsize, end * self._itemsize):
            self._files.append_tokens(data)
        if not self._files.has_mask:
            return
        if self._parts[index].splits[self._split].mask_hash is None:
            for first in range(start, end, COPY_BYTES):
                self._files.append_targets(b"\x01" * min(COPY_BYTES, end - first))
            return
        for data in read_blocks(part_path(folder, index, f"{self._split}.mask"), start, end):
            self._files.append_targets(data)


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
