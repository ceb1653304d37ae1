"""Plain text files: one document each, read in pieces when they are long."""

from collections.abc import Iterator
from typing import BinaryIO

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.cuts import WIDE, first_cut
from toolkit.data.prepare.text.filters import (
    MAX_SCORED_BYTES,
    NUM_WINDOWS,
    DocumentFilter,
    repetition,
    window_starts,
)
from toolkit.data.prepare.text.long_documents import character_start
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.reading import Counts, Reading, decode
from toolkit.data.prepare.text.shards import PIECE_BYTES, Range
from toolkit.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK_BYTES = 4 << 20
_BEFORE_CUT = 16
"""Bytes that surely hold the two characters before a place."""


def read_text(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The part of a file's text that lies in `part`, in pieces of about a megabyte."""
    source = reading.source
    is_stdlib = not isinstance(source, FilesSourceConfig)
    errors = source.encoding_errors if isinstance(source, FilesSourceConfig) else "strict"
    start = part.start
    first_piece = Piece(part.name, split=part.split)
    # Shorter files are one piece, on which `read_shard` decides.
    if _is_long(part):
        reason = _left_out(part, DocumentFilter(reading.filters))
        if reason is not None:
            if start == part.document_start:
                counts.leave_out(reason)
            return
        if reading.with_digests and start == part.document_start:
            digest, num_bytes = _digest(part)
            first_piece = first_piece._replace(digest=digest, num_bytes=num_bytes)
    with open(part.path, "rb") as file:
        while start < part.end:
            end = min((start // PIECE_BYTES + 1) * PIECE_BYTES, part.end)
            first, last = _cut(file, start, part), _cut(file, end, part)
            file.seek(first)
            data = file.read(last - first)
            try:
                text = decode(data, part.path, first, errors, counts)
            except DataError:
                if not is_stdlib:
                    raise
                # A few files of the standard library's tests are in other encodings on purpose.
                counts.skipped_documents += 1
                return
            if start == 0:
                text = text.removeprefix("\ufeff")
            starts, ends = start == part.document_start, end == part.document_end
            yield first_piece._replace(text=text, starts=starts, ends=ends)
            first_piece = Piece(part.name, split=part.split)
            start = end


def _cut(file: BinaryIO, position: int, part: Range) -> int:
    """The place at or after byte `position` that ends one piece and begins the next. It depends on
    the document and the position alone, so that two ranges agree on it."""
    if position in (part.document_start, part.document_end):
        return position
    first = max(position - _BEFORE_CUT, part.document_start)
    file.seek(first)
    window = file.read(min(WIDE, part.document_end - first))
    # The next place between two characters, in bytes and in characters.
    near = position - first
    while near < len(window) and character_start(window, near) != near:
        near += 1
    text = window.decode("utf-8", "surrogateescape")
    place = first_cut(text, len(window[:near].decode("utf-8", "surrogateescape")))
    if place is None:
        return first + near
    return first + len(text[:place].encode("utf-8", "surrogateescape"))


def _is_long(part: Range) -> bool:
    """Whether the document comes in more than one piece."""
    return part.document_start // PIECE_BYTES != (part.document_end - 1) // PIECE_BYTES


def _left_out(part: Range, rules: DocumentFilter) -> str | None:
    """The rule that leaves the whole document out. Every process that reads a part of it answers
    for itself: from its size where that settles it, else by counting; repetition from windows."""
    if not rules.is_active:
        return None
    num_bytes = part.document_end - part.document_start
    if rules.bytes_settle_length(num_bytes):
        reason = rules.length_reason(num_bytes)
    else:
        reason = rules.length_reason(_count_characters(part))
    if reason is None and rules.measures_repetition:
        reason = rules.repetition_reason(repetition(_windows(part, num_bytes)))
    return reason


def _count_characters(part: Range) -> int:
    import numpy as np

    # Bytes 10xxxxxx continue a character.
    return sum(
        int(np.count_nonzero(np.frombuffer(block, np.uint8) & 0xC0 != 0x80))
        for block in _blocks(part)
    )


def _windows(part: Range, num_bytes: int) -> Iterator[bytes]:
    size = min(num_bytes, MAX_SCORED_BYTES // NUM_WINDOWS)
    starts = window_starts(num_bytes, size)
    if num_bytes <= MAX_SCORED_BYTES:
        size, starts = num_bytes, [0]
    with open(part.path, "rb", buffering=0) as file:
        for start in starts:
            file.seek(part.document_start + start)
            yield file.read(size)


def _digest(part: Range) -> tuple[int, int]:
    """xxh3_128 and bytes of the whole document's text."""
    import xxhash

    digest, num_bytes = xxhash.xxh3_128(), 0
    for block in _blocks(part):
        if num_bytes == 0 and part.document_start == 0:
            block = block.removeprefix(BYTE_ORDER_MARK)
        digest.update(block)
        num_bytes += len(block)
    return digest.intdigest(), num_bytes


def _blocks(part: Range) -> Iterator[bytes]:
    with open(part.path, "rb", buffering=0) as file:
        file.seek(part.document_start)
        left = part.document_end - part.document_start
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            yield block
            left -= len(block)
