"""Where documents start: the .idx file of a split, checked, read in blocks, and asked by position.

Nothing here holds more than a block of the file in memory.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from toolkit.data.instances.base import DocumentPart
from toolkit.data.instances.plans import find_note, keep_note
from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.errors import DataError

BLOCK_DOCUMENTS = 1 << 18
"""Documents, and pieces of documents, worked on at once: some tens of megabytes."""


class Windows(NamedTuple):
    """Pieces of documents, in file order."""

    starts: np.ndarray
    """Position of each piece's first token in the .bin file: int64, `(pieces,)`."""
    lengths: np.ndarray
    """Tokens of each piece: int64, `(pieces,)`."""


class DocumentIndex:
    """Documents of one split by position of their tokens.

    Attributes:
        starts: position of each document's first token, uint64 `(num_documents,)`, a memory map.
        num_tokens: tokens of the split.

    Raises:
        DataError: the file is missing, has not the manifest's size, or is seen at once not to
            start with 0 or to go beyond the tokens. `verify` looks at all of it.
    """

    def __init__(self, prepared: PreparedDataset, split: Split) -> None:
        self._path = prepared.folder / f"{split}.idx"
        self._hash = prepared.manifest.splits[split].index_hash
        self.num_tokens = prepared.num_tokens(split)
        if prepared.num_documents(split) == 0:
            raise self._error(f"names no document, but there are {self.num_tokens:,} tokens")
        self.starts = np.asarray(prepared.document_starts(split))
        if self.starts[0] != 0:
            raise self._error(f"the first document starts at {self.starts[0]}, not at 0")
        if self.starts[-1] > self.num_tokens:
            raise self._error(
                f"document {len(self.starts) - 1} starts at {self.starts[-1]}, but the split has "
                f"{self.num_tokens} tokens"
            )

    def verify(self) -> None:
        """Read the whole file.

        Raises:
            DataError: starts that do not ascend, or content whose hash is not the manifest's.
        """
        wrong = what_is_wrong(self.starts, self.num_tokens, self._hash)
        if wrong is not None:
            raise self._error(wrong)

    def blocks(self) -> Iterator[Windows]:
        """All documents, whole, in blocks; empty ones have length 0."""
        for first in range(0, len(self.starts), BLOCK_DOCUMENTS):
            stop = min(first + BLOCK_DOCUMENTS, len(self.starts))
            starts = self.starts[first:stop].astype(np.int64)
            after = int(self.starts[stop]) if stop < len(self.starts) else self.num_tokens
            yield Windows(starts, np.diff(starts, append=after))

    def windows(self, sequence_length: int) -> Iterator[Windows]:
        """All documents cut every `sequence_length` tokens, counted from their own start."""
        for starts, lengths in self.blocks():
            ends = np.cumsum(-(-lengths // sequence_length))
            for first in range(0, int(ends[-1]), BLOCK_DOCUMENTS):
                numbers = np.arange(first, min(first + BLOCK_DOCUMENTS, int(ends[-1])))
                documents = np.searchsorted(ends, numbers, side="right")
                # Counted back from the document's last piece, which `ends` gives.
                pieces = -(-lengths[documents] // sequence_length)
                offsets = (numbers - (ends[documents] - pieces)) * sequence_length
                yield Windows(
                    starts[documents] + offsets,
                    np.minimum(lengths[documents] - offsets, sequence_length),
                )

    def parts(self, first: int, num_tokens: int) -> list[DocumentPart]:
        """The documents that the `num_tokens` tokens from position `first` belong to, in order."""
        # Of documents that start at the same place, all but the last are empty.
        number = int(np.searchsorted(self.starts, np.uint64(first), side="right")) - 1
        stop = int(np.searchsorted(self.starts, np.uint64(first + num_tokens), side="left"))
        bounds = [*self.starts[number : stop + 1].tolist(), self.num_tokens]
        return [
            DocumentPart(
                document,
                max(first, begin) - begin,
                min(first + num_tokens, end) - begin,
                end - begin,
            )
            for document, (begin, end) in enumerate(itertools.pairwise(bounds), number)
            if end > max(first, begin) and document < stop
        ]

    def _error(self, what: str) -> DataError:
        return DataError(
            f"{self._path}: document index disagrees with the tokens: {what}; restore it, or "
            f"delete {self._path.parent} and prepare the data again"
        )


def verify_once(prepared: PreparedDataset, split: Split) -> None:
    """`DocumentIndex.verify` for an index that was not found good before, as a note beside the
    plans says."""
    state = (prepared.folder / f"{split}.idx").stat()
    found = f"{state.st_size} {state.st_mtime_ns}"
    name = f"{split}.idx.{prepared.fingerprint(split)}.checked"
    if find_note(prepared, name) == found.encode():
        return
    DocumentIndex(prepared, split).verify()
    keep_note(prepared, name, found.encode())


def what_is_wrong(starts: np.ndarray, num_tokens: int, content_hash: str | None) -> str | None:
    """The first thing that is wrong with the starts of documents, in words. They ascend from 0 to
    `num_tokens` and have the xxh3_128 `content_hash` (None: it is not known)."""
    scan = IndexScan(num_tokens)
    for first in range(0, len(starts), BLOCK_DOCUMENTS):
        scan.look(starts[first : first + BLOCK_DOCUMENTS])
    if scan.wrong is None and content_hash not in (None, scan.content_hash):
        return "its content is not what dataset.json beside it says"
    return scan.wrong


class IndexScan:
    """The starts of documents, block after block: the first is 0, none falls back, none lies beyond
    the tokens.

    Attributes:
        wrong: the first that does not, in words; None: all do so far.
    """

    def __init__(self, num_tokens: int) -> None:
        self.wrong: str | None = None
        self._num_tokens, self._position, self._last = num_tokens, 0, np.uint64(0)
        self._digest = xxhash.xxh3_128()

    @property
    def content_hash(self) -> str:
        """xxh3_128."""
        return self._digest.hexdigest()

    def look(self, block: np.ndarray) -> np.ndarray:
        """The next block. Returns the tokens from each start to the one before it, uint64; only of
        use while nothing is wrong."""
        self._digest.update(block.data)
        before = np.concatenate([[self._last], block[:-1]])
        if self.wrong is None:
            self.wrong = self._find(block, before)
        self._position += len(block)
        self._last = block[-1]
        return block - before

    def _find(self, block: np.ndarray, before: np.ndarray) -> str | None:
        is_wrong = (block < before) | (block > np.uint64(self._num_tokens))
        if self._position == 0:
            is_wrong[0] |= block[0] != 0
        place = int(is_wrong.argmax())
        if not is_wrong[place]:
            return None
        number, start = self._position + place, int(block[place])
        if number == 0:
            return f"document 0 starts at {start:,}, not at 0"
        if start < before[place]:
            last = f"document {number - 1:,} at {before[place]:,}"
            return f"document {number:,} starts at {start:,}, before {last}"
        return f"document {number:,} starts at {start:,}, after the {self._num_tokens:,} tokens"
