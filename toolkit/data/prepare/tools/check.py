"""The files of one split against what dataset.json says of them; every problem is found."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from toolkit.data.instances.index import IndexScan
from toolkit.data.prepare.build.split_files import memory_map, token_blocks
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    NUM_BLOCKS_CHECKED_AT_OPEN,
    Manifest,
    Split,
    hash_blocks,
)
from toolkit.storage.progress import Advance

_NOTHING = np.empty(0, dtype=np.uint64)
_DOCUMENTS_AT_ONCE = 1 << 20
_OTHER_CONTENT = f"content differs from {MANIFEST_NAME} (hash of the whole file)"


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

    def count_lengths(self, lengths: np.ndarray) -> None:
        """Add documents of these lengths in tokens."""
        if len(lengths) == 0:
            return
        counted = sum(self.histogram) + self.empty_documents
        least = int(lengths.min())
        self.shortest = min(self.shortest, least) if counted else least
        self.longest = max(self.longest, int(lengths.max()))
        self.empty_documents += int((lengths == 0).sum())
        # The exponent of a float64 is exact for every length below 2**53.
        exponents = np.frexp(lengths[lengths > 0].astype(np.float64))[1] - 1
        found = np.bincount(exponents, minlength=len(self.histogram))
        found[: len(self.histogram)] += np.array(self.histogram, dtype=np.int64)
        self.histogram = found.tolist()


def file_size(path: Path) -> int | None:
    """Bytes of a file; None: there is none."""
    return path.stat().st_size if path.exists() else None


def scan_ids(
    path: Path,
    dtype: str,
    vocab_size: int | None,
    advance: Advance,
    *,
    first_byte: int = 0,
    num_tokens: int | None = None,
    look: Callable[[int, np.ndarray], None] = lambda position, block: None,
) -> tuple[int, str | None, str]:
    """The largest id of a file; what is wrong with its ids, in words; xxh3_128 of them. `look` is
    given every block with its position."""
    digest = xxhash.xxh3_128()
    largest = count = 0
    first = (0, 0)
    for position, block in token_blocks(path, dtype, first_byte=first_byte, num_tokens=num_tokens):
        digest.update(block.data)
        largest = max(largest, int(block.max()))
        if vocab_size is not None and largest >= vocab_size:
            outside = np.flatnonzero(block >= vocab_size)
            if not count and len(outside):
                first = position + int(outside[0]), int(block[outside[0]])
            count += len(outside)
        look(position, block)
        advance(block.nbytes)
    wrong = None
    if count:
        wrong = (
            f"token {first[0]:,} has id {first[1]:,}, outside the vocabulary of {vocab_size:,} "
            f"({count:,} such tokens)"
        )
    return largest, wrong, digest.hexdigest()


class SplitCheck:
    """Checks one split.

    Attributes:
        ids, starts: memory maps of what is there; empty where a file is missing.
        is_readable: both have the size and the shape that they must have.
    """

    def __init__(self, folder: Path, split: Split, manifest: Manifest, problems: list[str]) -> None:
        """`problems` takes what is wrong, in the order it is found."""
        self._manifest, self._info = manifest, manifest.splits[split]
        self._problems = problems
        self._files = {ending: folder / f"{split}.{ending}" for ending in ("bin", "idx", "mask")}
        info = self._info
        self.report = SplitReport(
            name=split,
            num_bytes=file_size(self._files["bin"]) or 0,
            num_tokens=info.num_tokens,
            num_documents=info.num_documents,
            num_targets=info.num_targets,
            bytes_per_token=info.text_bytes / info.num_tokens if info.text_bytes else None,
        )
        self.ids = self.starts = _NOTHING
        self.is_readable = False

    def run(self, *, quick: bool, advance: Advance) -> SplitReport:
        """Check sizes, index and a few blocks; unless `quick`, everything."""
        info, dtype = self._info, self._manifest.dtype
        itemsize = np.dtype(dtype).itemsize
        has_tokens = self._check_size("bin", info.num_tokens, itemsize, "tokens")
        has_index = self._check_size("idx", info.num_documents, 8, "documents")
        has_mask = info.mask_hash is not None and self._check_size(
            "mask", info.num_tokens, 1, "tokens"
        )
        index_agrees = False
        if has_tokens:
            self.ids = memory_map(self._files["bin"], dtype)
        if has_index:
            self.starts = memory_map(self._files["idx"], "uint64")
            index_agrees = self._check_index(quick=quick)
        self.is_readable = 0 < len(self.ids) == info.num_tokens and index_agrees
        if has_tokens and quick:
            self._check_sampled_blocks()
        elif has_tokens:
            found = scan_ids(self._files["bin"], dtype, self._manifest.vocab_size, advance)
            self.report.largest_id, wrong, content_hash = found
            if wrong is not None:
                self._problem("bin", wrong)
            if content_hash != info.content_hash:
                self._problem("bin", _OTHER_CONTENT)
        if self.is_readable:
            self._check_document_ends()
        if has_mask and not quick:
            self._check_mask()
        return self.report

    def start_of(self, document: int) -> int:
        """Where a document begins, or (one past the last) the tokens end."""
        return len(self.ids) if document == len(self.starts) else int(self.starts[document])

    def _check_size(self, ending: str, count: int, itemsize: int, what: str) -> bool:
        """Whether the file is there; a problem where its size is not as recorded."""
        size = file_size(self._files[ending])
        if size is None:
            self._problem(ending, "is missing; restore it, or prepare the data again")
            return False
        if size % itemsize:
            self._problem(
                ending, f"has {size:,} bytes, no multiple of the {itemsize} bytes of one number"
            )
        there, counted = size // itemsize, f"that {MANIFEST_NAME} counts"
        if size > count * itemsize:
            self._problem(ending, f"holds {there:,} {what} in place of {count:,} {counted}")
        elif size < count * itemsize:
            self._problem(ending, f"holds {there:,} of the {count:,} {what} {counted}: cut off")
        return True

    def _check_index(self, *, quick: bool) -> bool:
        """Whether the starts can be those of documents in these tokens."""
        info = self._info
        scan = IndexScan(info.num_tokens)
        for position, block in token_blocks(self._files["idx"], "uint64"):
            lengths = scan.look(block).astype(np.int64)
            if scan.wrong is None:
                self.report.count_lengths(lengths if position else lengths[1:])
        if scan.wrong is not None:
            self._problem("idx", f"{scan.wrong}; the index does not belong to these tokens")
            self.report.histogram, self.report.shortest = [], 0
        elif len(self.starts):
            self.report.count_lengths(np.array([info.num_tokens - int(self.starts[-1])]))
        if info.index_hash is not None and not quick and scan.content_hash != info.index_hash:
            self._problem("idx", _OTHER_CONTENT)
        return scan.wrong is None and len(self.starts) == info.num_documents

    def _check_sampled_blocks(self) -> None:
        expected = self._info.block_hashes
        every = max(1, len(expected) // (NUM_BLOCKS_CHECKED_AT_OPEN * 4))
        for number, found in hash_blocks(self._files["bin"], every).items():
            if expected[number] != found:
                what = f"content differs from {MANIFEST_NAME} (sampled block {number})"
                self._problem("bin", what)
                return

    def _check_document_ends(self) -> None:
        manifest, count, starts = self._manifest, len(self.ids), self.starts
        rules: list[tuple[bool, str, int | None, slice, int]] = [
            (manifest.append_eos, "do not end with eos id", manifest.eos_id, slice(1, None), -1),
            (manifest.prepend_bos, "do not start with bos id", manifest.bos_id, slice(-1), 0),
        ]
        for is_asked, what, wanted, bound, offset in rules:
            wrong, first = 0, 0
            for position in range(0, len(starts) if is_asked else 0, _DOCUMENTS_AT_ONCE):
                bounds = starts[position : position + _DOCUMENTS_AT_ONCE + 1].astype(np.int64)
                if position + _DOCUMENTS_AT_ONCE >= len(starts):
                    bounds = np.append(bounds, count)
                places = np.clip(bounds[bound] + offset, 0, count - 1)
                is_wrong = self.ids[places] != wanted
                if not wrong and is_wrong.any():
                    first = position + int(np.argmax(is_wrong))
                wrong += int(is_wrong.sum())
            if wrong:
                which = f"{wrong:,} of {len(starts):,} documents {what} {wanted}"
                place = f"(first: document {first:,}), though {MANIFEST_NAME} says that all do"
                self._problem("bin", f"{which} {place}")

    def _check_mask(self) -> None:
        targets = others = 0
        digest = xxhash.xxh3_128()
        for _, block in token_blocks(self._files["mask"], "uint8"):
            digest.update(block.data)
            targets += int(np.count_nonzero(block))
            others += int(np.count_nonzero(block > 1))
        if others:
            self._problem("mask", f"{others:,} of its numbers are neither 0 nor 1")
        if targets != self._info.num_targets:
            there = self._info.num_targets or 0
            self._problem("mask", f"has {targets:,} targets, {MANIFEST_NAME} says {there:,}")
        if digest.hexdigest() != self._info.mask_hash:
            self._problem("mask", _OTHER_CONTENT)

    def _problem(self, ending: str, what: str) -> None:
        self._problems.append(f"{self._files[ending]}: {what}")
