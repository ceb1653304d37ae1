"""Plain text files: one document each, read in pieces of a megabyte when they are longer."""

import itertools
from collections.abc import Iterator

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.cuts import WIDE, first_cut
from toolkit.data.prepare.text.filters import DocumentGate
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, decode
from toolkit.data.prepare.text.shards import PIECE_BYTES, Range
from toolkit.errors import DataError

_BEFORE_CUT = 16
"""Bytes that surely hold the two characters before a place."""


def read_text(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The pieces of a document that lie in `part`. All ranges of a long document read all of it, so
    that they agree on what it is."""
    source, begin = reading.source, part.document_start
    errors = source.encoding_errors if isinstance(source, FilesSourceConfig) else "strict"
    with open(part.path, "rb") as file:
        file.seek(begin)
        data = file.read(part.document_end - begin)
    is_first = part.start == begin
    document = Piece(f"{part.name}:{begin}" if part.is_rest else part.name, split=part.split)
    counts.cut_documents += part.is_rest and is_first
    # Shorter ones are one piece, which `read_shard` looks at.
    is_long = begin // PIECE_BYTES != (part.document_end - 1) // PIECE_BYTES
    if is_long and (reading.filters is not None or reading.with_digests):
        text = decode(data, part.path, begin, errors, Counts())
        gate = DocumentGate(reading, counts if is_first else Counts())
        admitted = gate.admit(document._replace(text=_without_mark(text, begin)))
        if admitted is None:
            return
        document = admitted if is_first else document
    first_place = (part.start // PIECE_BYTES + 1) * PIECE_BYTES
    places = [part.start, *range(first_place, part.end, PIECE_BYTES), part.end]
    for start, end in itertools.pairwise(places):
        first, last = _cut(data, start - begin), _cut(data, end - begin)
        try:
            text = decode(data[first:last], part.path, begin + first, errors, counts)
        except DataError:
            if isinstance(source, FilesSourceConfig):
                raise
            # A few files of the standard library's tests are in other encodings on purpose.
            counts.skipped_documents += 1
            return
        starts, ends = start == begin, end == part.document_end
        text = _without_mark(text, start)
        yield document._replace(text=text, starts=starts, ends=ends)
        document = document._replace(digest=0, num_bytes=0)


def _without_mark(text: str, place: int) -> str:
    return text.removeprefix("\ufeff") if place == 0 else text


def _cut(data: bytes, position: int) -> int:
    """The place at or after byte `position` that ends one piece and begins the next. It depends on
    the document and the position alone, so that two ranges agree on it."""
    if position in (0, len(data)):
        return position
    first = max(position - _BEFORE_CUT, 0)
    window = data[first : first + WIDE]
    near = position - first
    # At the start of a character, which has no more than three bytes that go on.
    while near < min(len(window), position - first + 3) and window[near] & 0xC0 == 0x80:
        near += 1
    text = window.decode("utf-8", "surrogateescape")
    place = first_cut(text, len(window[:near].decode("utf-8", "surrogateescape")))
    if place is None:
        return first + near
    return first + len(text[:place].encode("utf-8", "surrogateescape"))
