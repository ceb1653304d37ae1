"""The token files of one split: written, read in blocks, and copied document by document.

Whatever makes token files (worker processes, joining their parts, merging, splitting) writes them
with a `SplitWriter`. Whatever takes over whole splits goes through `copy_documents`, which checks
what it reads against the hashes that were taken when the files were written.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from toolkit.data.instances.index import IndexScan
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    NUM_BLOCKS,
    Split,
    SplitInfo,
    TokenDType,
    hash_blocks,
)
from toolkit.errors import DataError
from toolkit.storage.progress import Advance

BLOCK_TOKENS = 4 << 20
"""Numbers held at once; 16 MiB of uint32."""

Chooser = Callable[[int, int], np.ndarray]
"""`(first, end)` -> for each of these documents the number of its output, -1: it is left out."""


class SplitFiles(NamedTuple):
    """Where the files of one split are, and what they hold."""

    folder: Path
    split: Split
    dtype: TokenDType
    info: SplitInfo

    def path(self, ending: str) -> Path:
        """`train.bin` and its like."""
        return self.folder / f"{self.split}.{ending}"


class HashedFile:
    """A file whose xxh3_128 is taken while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_128()

    def write(self, array: np.ndarray) -> None:
        """Append the numbers of `array`."""
        data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> str:
        """Close the file; returns the hash of its content."""
        self._file.close()
        return self._digest.hexdigest()


class SplitWriter:
    """Writes `{split}.bin`, `.idx` and, where asked for, `.mask`.

    Attributes:
        text_bytes: UTF-8 bytes of the text of what was appended; whoever appends counts them.
    """

    def __init__(self, folder: Path, split: Split, dtype: TokenDType, *, has_mask: bool) -> None:
        self.split: Split = split
        self.has_mask = has_mask
        self.text_bytes = self.num_tokens = 0
        self._num_documents = self._num_targets = 0
        self._dtype = np.dtype(dtype)
        endings = ("bin", "idx", "mask") if has_mask else ("bin", "idx")
        self._files = {ending: HashedFile(folder / f"{split}.{ending}") for ending in endings}

    def append(self, ids: np.ndarray, starts: np.ndarray, targets: np.ndarray | None) -> None:
        """Add tokens.

        Args:
            ids: shape `(num_tokens,)`.
            starts: at which of them documents begin, shape `(num_documents,)`.
            targets: which of them the loss asks for, uint8 like `ids`; None: all.
        """
        self._files["bin"].write(ids.astype(self._dtype, copy=False))
        self._files["idx"].write((starts + self.num_tokens).astype(np.uint64))
        if self.has_mask:
            targets = np.ones(len(ids), dtype=np.uint8) if targets is None else targets
            self._files["mask"].write(targets)
            self._num_targets += int(np.count_nonzero(targets))
        self.num_tokens += len(ids)
        self._num_documents += len(starts)

    def close(self) -> dict[str, str]:
        """Close the files; returns their hashes by ending."""
        return {ending: file.close() for ending, file in self._files.items()}

    def finish(self) -> SplitInfo | None:
        """Counts and hashes; None, and no files, when there is no token."""
        hashes = self.close()
        if self.num_tokens == 0:
            for file in self._files.values():
                os.unlink(file.path)
            return None
        blocks = hash_blocks(self._files["bin"].path)
        return SplitInfo(
            num_tokens=self.num_tokens,
            num_documents=self._num_documents,
            text_bytes=self.text_bytes,
            content_hash=hashes["bin"],
            block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
            index_hash=hashes["idx"],
            mask_hash=hashes.get("mask"),
            num_targets=self._num_targets if self.has_mask else None,
        )


def finish_all(writers: Sequence[SplitWriter]) -> dict[str, SplitInfo]:
    """`SplitWriter.finish` of each, by split; those without a token are left out."""
    found = {writer.split: writer.finish() for writer in writers}
    return {split: info for split, info in found.items() if info is not None}


def token_blocks(
    path: Path, dtype: str, *, first_byte: int = 0, num_tokens: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of a file in order, as `(position of the first, block)`; a block is valid until
    the next one. What is no whole number at the end is left out."""
    buffer = np.empty(BLOCK_TOKENS, dtype=dtype)
    view, itemsize = buffer.data.cast("B"), buffer.itemsize
    position = 0
    with path.open("rb", buffering=0) as file:
        file.seek(first_byte)
        while num_tokens is None or position < num_tokens:
            left = BLOCK_TOKENS if num_tokens is None else num_tokens - position
            wanted = view[: min(left, BLOCK_TOKENS) * itemsize]
            filled = 0
            while filled < len(wanted) and (count := file.readinto(wanted[filled:])):
                filled += count
            block = buffer[: filled // itemsize]
            if len(block):
                yield position, block
            position += len(block)
            if filled < len(wanted):
                return


def memory_map(path: Path, dtype: str) -> np.ndarray:
    """The whole numbers of a file as a read-only memory map; an empty array for an empty file."""
    count = path.stat().st_size // np.dtype(dtype).itemsize
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def copy_documents(
    source: SplitFiles, outputs: Sequence[SplitWriter], choose: Chooser, advance: Advance
) -> None:
    """Append every document of a split to the output that `choose` names, in order. DataError names
    the first file that does not hold what `source.info` says."""
    starts = _checked_starts(source)
    mask = memory_map(source.path("mask"), "uint8") if source.info.mask_hash is not None else None
    tokens_hash, mask_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
    document = 0
    for position, block in token_blocks(source.path("bin"), source.dtype):
        tokens_hash.update(block.data)
        end = position + len(block)
        targets = None if mask is None else np.asarray(mask[position:end])
        if targets is not None:
            mask_hash.update(targets.data)
        # Documents that start in this block; the one before goes on in it.
        side: Literal["left", "right"] = "right" if end == source.info.num_tokens else "left"
        following = document + int(np.searchsorted(starts[document:], np.uint64(end), side))
        first = max(0, document - 1)
        begins = starts[first:following].astype(np.int64) - position
        lengths = np.diff(np.maximum(begins, 0), append=len(block))
        chosen = choose(first, following)
        owners = None if len(outputs) == 1 and not chosen.any() else np.repeat(chosen, lengths)
        for number, output in enumerate(outputs):
            if owners is None:
                output.append(block, begins[begins >= 0], targets)
                continue
            is_own, is_chosen = owners == number, chosen == number
            kept = lengths * is_chosen
            new_starts = np.cumsum(kept) - kept
            output.append(
                block[is_own],
                new_starts[is_chosen & (begins >= 0)],
                targets[is_own] if targets is not None else None,
            )
        document = following
        advance(block.nbytes)
    info = source.info
    for ending, digest, wanted in (
        ("bin", tokens_hash, info.content_hash),
        ("mask", mask_hash, info.mask_hash),
    ):
        if wanted is not None and digest.hexdigest() != wanted:
            raise DataError(
                f"{source.path(ending)}: content differs from {MANIFEST_NAME} beside it; restore "
                "it, or prepare the data again"
            )


def _checked_starts(source: SplitFiles) -> np.ndarray:
    scan = IndexScan(source.info.num_tokens)
    for position, block in token_blocks(source.path("idx"), "uint64"):
        scan.look(position, block)
    starts = memory_map(source.path("idx"), "uint64")
    wanted = source.info.index_hash
    if len(starts) == 0 or scan.wrong is not None or wanted not in (None, scan.content_hash):
        raise DataError(
            f"{source.path('idx')}: does not agree with {MANIFEST_NAME} and the tokens beside it; "
            "restore it, or prepare the data again"
        )
    return starts
