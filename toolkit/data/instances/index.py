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
from toolkit.data.tokens.units import DOCUMENTS
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
    """Documents of one split by position of their tokens. Where they form units
    (`toolkit.data.tokens.units`), `blocks` and `windows` give those in their place.

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
        self.unit = prepared.unit
        self.starts = np.asarray(prepared.document_starts(split))
        if self.starts[0] != 0:
            raise self._error(f"the first document starts at {self.starts[0]}, not at 0")
        if self.starts[-1] > self.num_tokens:
            raise self._error(
                f"document {len(self.starts) - 1} starts at {self.starts[-1]}, but the split has "
                f"{self.num_tokens} tokens"
            )
        if self.unit is not None and len(self.starts) % DOCUMENTS:
            raise self._error(f"{len(self.starts):,} documents are no whole number of pairs")

    def verify(self) -> None:
        """Read the whole file.

        Raises:
            DataError: starts that do not ascend, or content whose hash is not the manifest's.
        """
        wrong, content_hash = scan_starts(self.starts, self.num_tokens)
        if wrong is None and self._hash not in (None, content_hash):
            wrong = "its content is not what dataset.json beside it says"
        if wrong is not None:
            raise self._error(wrong)

    def blocks(self) -> Iterator[Windows]:
        """All documents, or units, whole, in blocks; empty ones have length 0."""
        for starts, lengths in documents_of(self.starts, self.num_tokens):
            if self.unit is not None:
                starts, lengths = starts[::DOCUMENTS], lengths.reshape(-1, DOCUMENTS).sum(axis=1)
            yield Windows(starts, lengths)

    def windows(self, sequence_length: int) -> Iterator[Windows]:
        """All documents cut every `sequence_length` tokens, counted from their own start. Units
        are not cut: those longer than `sequence_length` are left out."""
        for starts, lengths in self.blocks():
            if self.unit is not None:
                fits = lengths <= sequence_length
                if fits.any():
                    yield Windows(starts[fits], lengths[fits])
                continue
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

    def units_at(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of each unit that begins at one of `starts`, and where its second document does:
        int64, like `starts`."""
        firsts = np.searchsorted(self.starts, starts.astype(np.uint64))
        return firsts // DOCUMENTS, self.starts[firsts + 1].astype(np.int64)

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


def documents_of(starts: np.ndarray, num_tokens: int) -> Iterator[Windows]:
    """The documents that begin at `starts`, whole, in blocks; empty ones have length 0."""
    for first in range(0, len(starts), BLOCK_DOCUMENTS):
        block = starts[first : first + BLOCK_DOCUMENTS + 1].astype(np.int64)
        lengths = np.diff(block, append=num_tokens)[:BLOCK_DOCUMENTS]
        yield Windows(block[:BLOCK_DOCUMENTS], lengths)


def scan_starts(starts: np.ndarray, num_tokens: int) -> tuple[str | None, str]:
    """What is wrong with the starts of documents (the first is 0, none falls back, none lies beyond
    the tokens), in words, and their xxh3_128."""
    wrong, last, digest = None, np.uint64(0), xxhash.xxh3_128()
    for first in range(0, len(starts), BLOCK_DOCUMENTS):
        block = np.asarray(starts[first : first + BLOCK_DOCUMENTS])
        digest.update(block.data)
        before = np.concatenate([[last], block[:-1]])
        last = block[-1]
        is_wrong = (block < before) | (block > np.uint64(num_tokens))
        if first == 0:
            is_wrong[0] |= block[0] != 0
        place = int(is_wrong.argmax())
        if wrong is not None or not is_wrong[place]:
            continue
        number, start = first + place, int(block[place])
        if number == 0:
            wrong = f"document 0 starts at {start:,}, not at 0"
        elif start < before[place]:
            there = f"document {number - 1:,} at {before[place]:,}"
            wrong = f"document {number:,} starts at {start:,}, before {there}"
        else:
            wrong = f"document {number:,} starts at {start:,}, after the {num_tokens:,} tokens"
    return wrong, digest.hexdigest()
