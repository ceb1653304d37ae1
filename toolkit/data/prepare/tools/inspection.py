"""What an inspection of token files reports."""

from pathlib import Path

import msgspec
import numpy as np

SAMPLE_TOKENS = 120
"""Tokens shown of a sampled document."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of one document."""

    document: int
    num_tokens: int | None
    """None: not known, the end was not looked for."""
    ids: list[int]
    text: str | None
    """None: there is no tokenizer to decode with."""


class SplitReport(msgspec.Struct, kw_only=True):
    """What one token file holds."""

    name: str
    num_bytes: int
    num_tokens: int = 0
    num_documents: int | None = None
    """None: not known, the file has no index and no end-of-document id was given."""
    num_targets: int | None = None
    """Tokens the loss asks for; None: all."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text; None where that is not known."""
    largest_id: int | None = None
    """None: the file was not read."""
    shortest: int = 0
    longest: int = 0
    histogram: list[int] = []
    """Entry k counts documents of 2**k to 2**(k+1)-1 tokens."""
    empty_documents: int = 0
    samples: list[Sample] = []


class Inspection(msgspec.Struct, kw_only=True):
    """What was found at one path."""

    path: str
    dtype: str
    vocab_size: int | None
    eos_id: int | None
    append_eos: bool | None = None
    bos_id: int | None = None
    prepend_bos: bool = False
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None for a bare file."""
    splits: list[SplitReport]
    problems: list[str]
    """All that is wrong, in the order it was found; empty: the files are whole."""
    is_quick: bool = False


class BadIds:
    """Ids outside the vocabulary, over many blocks."""

    def __init__(self, vocab_size: int | None) -> None:
        self._vocab_size = vocab_size
        self.largest = self.count = 0
        self._first: tuple[int, int] | None = None

    def look(self, position: int, block: np.ndarray) -> None:
        largest = int(block.max())
        self.largest = max(self.largest, largest)
        if self._vocab_size is None or largest < self._vocab_size:
            return
        outside = np.flatnonzero(block >= self._vocab_size)
        if self._first is None:
            self._first = position + int(outside[0]), int(block[outside[0]])
        self.count += len(outside)

    def describe(self) -> str:
        assert self._first is not None
        place, value = self._first
        return (
            f"token {place:,} has id {value:,}, outside the vocabulary of {self._vocab_size:,} "
            f"({self.count:,} such tokens)"
        )


def spread(num_documents: int, count: int) -> list[int]:
    """Up to `count` numbers of documents, at equal distances from the first on."""
    return sorted({turn * num_documents // count for turn in range(count)}) if num_documents else []


def count_lengths(histogram: np.ndarray, lengths: np.ndarray) -> None:
    positive = lengths[lengths > 0]
    # The exponent of a float64 is exact for every length below 2**53.
    exponents = np.frexp(positive.astype(np.float64))[1] - 1
    histogram += np.bincount(exponents, minlength=len(histogram))


def trimmed(histogram: np.ndarray) -> list[int]:
    used = np.flatnonzero(histogram)
    return histogram[: int(used[-1]) + 1].tolist() if len(used) else []


def file_size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
