"""Plain text files: one document each, given in pieces of a megabyte when they are longer."""

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
    """The document that `part` is."""
    source, begin = reading.source, part.start
    errors = source.encoding_errors if isinstance(source, FilesSourceConfig) else "strict"
    with open(part.path, "rb") as file:
        file.seek(begin)
        data = file.read(part.end - begin)
    counts.cut_documents += part.is_rest
    try:
        text = decode(data, part.path, begin, errors, counts)
    except DataError:
        if isinstance(source, FilesSourceConfig):
            raise
        # A few files of the standard library's tests are in other encodings on purpose.
        counts.skipped_documents += 1
        return
    identity = f"{part.name}:{begin}" if part.is_rest else part.name
    whole = Piece(identity, _without_mark(text, begin), split=part.split)
    places = range((begin // PIECE_BYTES + 1) * PIECE_BYTES, part.end, PIECE_BYTES)
    if not places:
        yield whole  # which `read_shard` looks at
        return
    document = DocumentGate(reading, counts).admit(whole)
    if document is None:
        return
    ends = [*(_cut(data, place - begin) for place in places), len(data)]
    for first, last in itertools.pairwise([0, *ends]):
        text = _without_mark(data[first:last].decode(errors="replace"), begin + first)
        yield document._replace(text=text, starts=first == 0, ends=last == len(data))
        document = document._replace(digest=0, num_bytes=0)


def _without_mark(text: str, place: int) -> str:
    return text.removeprefix("\ufeff") if place == 0 else text


def _cut(data: bytes, position: int) -> int:
    """The place at or after byte `position` that ends one piece and begins the next."""
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
