"""The token files of one split: written, read in blocks, and copied document by document.

Whatever makes token files (worker processes, joining their parts, merging, splitting) writes them
with a `SplitWriter`. Whatever takes over whole splits goes through `copy_documents`, which checks
what it reads against the hashes that were taken when the files were written.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from toolkit.data.instances.index import scan_starts
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

Chooser = Callable[[slice], np.ndarray]
"""For each document of a slice the number of its output; -1: it is left out."""


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
    """A file that grows by appending, and the xxh3_128 of it. It is open only while it is written:
    there may be more of them than a process may open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = xxhash.xxh3_128()
        path.touch(exist_ok=False)

    def write(self, array: np.ndarray) -> None:
        """Append the numbers of `array`."""
        if array.size:
            data = np.ascontiguousarray(array).data.cast("B")
            self._digest.update(data)
            with self.path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]

    @property
    def content_hash(self) -> str:
        """xxh3_128 of what was written."""
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

    def finish(self) -> dict[str, SplitInfo]:
        """Counts and hashes under the split's name; nothing, and no files, when there is no
        token."""
        if self.num_tokens == 0:
            for file in self._files.values():
                file.path.unlink()
            return {}
        blocks = hash_blocks(self._files["bin"].path)
        info = SplitInfo(
            num_tokens=self.num_tokens,
            num_documents=self._num_documents,
            text_bytes=self.text_bytes,
            content_hash=self._files["bin"].content_hash,
            block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
            index_hash=self._files["idx"].content_hash,
            mask_hash=self._files["mask"].content_hash if self.has_mask else None,
            num_targets=self._num_targets if self.has_mask else None,
        )
        return {self.split: info}


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


def bounds_of(starts: np.ndarray, num_tokens: int, first: int, count: int) -> list[int]:
    """`count` places where documents start or end, from the start of document `first` on."""
    found: list[int] = starts[first : first + count].tolist()
    return [*found, num_tokens] if len(found) < count else found


def copy_documents(
    source: SplitFiles, outputs: Sequence[SplitWriter], choose: Chooser, advance: Advance
) -> None:
    """Append every document of a split to the output that `choose` names, in order. DataError names
    the first file that does not hold what `source.info` says."""
    info, dtype = source.info, source.dtype
    starts = _checked_starts(source)
    mask = memory_map(source.path("mask"), "uint8") if info.mask_hash is not None else None
    tokens_hash, mask_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
    document = 0
    for position, block in token_blocks(source.path("bin"), dtype):
        tokens_hash.update(block.data)
        end = position + len(block)
        targets = None if mask is None else np.asarray(mask[position:end])
        if targets is not None:
            mask_hash.update(targets.data)
        # Documents that start in this block; the one before goes on in it.
        side: Literal["left", "right"] = "right" if end == info.num_tokens else "left"
        following = document + int(np.searchsorted(starts[document:], np.uint64(end), side))
        first = max(0, document - 1)
        begins = starts[first:following].astype(np.int64) - position
        bounds = np.append(np.maximum(begins, 0), len(block))
        chosen = choose(slice(first, following))
        order = np.argsort(chosen, kind="stable")
        borders = np.flatnonzero(np.diff(chosen[order])) + 1
        for own in np.split(order, borders):
            output = int(chosen[own[0]])
            if output < 0:
                continue
            # What lies between the first and the last of them may be another's.
            last = int(own[-1]) + 1
            tokens = slice(int(bounds[own[0]]), int(bounds[last]))
            lengths = np.diff(bounds[own[0] : last + 1])
            is_own = chosen[own[0] : last] == output
            taken = (
                tokens
                if is_own.all()
                else tokens.start + np.flatnonzero(np.repeat(is_own, lengths))
            )
            kept = bounds[own + 1] - bounds[own]
            outputs[output].append(
                block[taken],
                (np.cumsum(kept) - kept)[begins[own] >= 0],
                targets[taken] if targets is not None else None,
            )
        document = following
        advance(block.nbytes)
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
    info, path = source.info, source.path("idx")
    starts = memory_map(path, "uint64")
    wrong, content_hash = scan_starts(starts, info.num_tokens)
    if len(starts) == 0 or wrong is not None or info.index_hash not in (None, content_hash):
        raise DataError(
            f"{path}: does not agree with {MANIFEST_NAME} and the tokens beside it; restore it, or "
            "prepare the data again"
        )
    return starts
