"""Documents that are too long to be decoded at once: their text is made slice by slice.

A whole decoded string would take up to four bytes a character on top of the bytes themselves, which
stay as they are in memory, once.
"""

from collections.abc import Callable, Iterator

from toolkit.data.prepare.text.cuts import last_cut
from toolkit.data.prepare.text.filters import MAX_SCORED_BYTES, DocumentFilter, repetition
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.reading import PIECE_CHARACTERS, Counts, Reading, decode

LONG_BYTES = 8 << 20
"""A document whose bytes are more than this is decoded in slices."""


def long_document(
    slices: Callable[[Counts], Iterator[str]],
    num_bytes: int,
    identity: str,
    reading: Reading,
    counts: Counts,
) -> Iterator[Piece]:
    """The pieces of one document, or none where a filter leaves it out.

    Args:
        slices: makes the document's text, of which there is some, in slices of about
            `PIECE_CHARACTERS` bytes; asked twice. What it raises the first time comes through
            before anything is counted.
        num_bytes: of all slices together.
    """
    replaced = Counts()
    facts = _Facts(slices(replaced), num_bytes, reading)
    counts.replaced_bytes += replaced.replaced_bytes
    if facts.left_out is not None:
        counts.leave_out(facts.left_out)
        return iter(())
    return _pieces(_cut_again(slices(Counts())), identity, facts)


def utf8_slices(data: memoryview, where: str, errors: str, counts: Counts) -> Iterator[str]:
    """The text of UTF-8 bytes; see `reading.decode`."""
    start = 0
    while start < len(data):
        end = character_start(data, min(start + PIECE_CHARACTERS, len(data)))
        yield decode(bytes(data[start:end]), where, start, errors, counts)
        start = end


def character_start(data: memoryview | bytes, end: int) -> int:
    """The last place up to `end` that is not inside a UTF-8 character; among bytes that are no
    UTF-8, `end` itself."""
    if end < len(data):
        for place in range(end, max(end - 4, 0), -1):
            if data[place] & 0xC0 != 0x80:
                return place
    return end


class _Facts:
    """What filters and comparisons need to know of a whole document; one pass over it."""

    def __init__(self, slices: Iterator[str], num_bytes: int, reading: Reading) -> None:
        import xxhash

        rules = DocumentFilter(reading.filters)
        window = MAX_SCORED_BYTES // -(-num_bytes // PIECE_CHARACTERS)
        digest = xxhash.xxh3_128()
        self.num_bytes = 0
        num_characters = 0
        windows = []
        for text in slices:
            data = text.encode()
            num_characters += len(text)
            self.num_bytes += len(data)
            if reading.with_digests:
                digest.update(data)
            if rules.measures_repetition:
                windows.append(data[:window])
        self.digest = digest.intdigest() if reading.with_digests else 0
        self.left_out = rules.length_reason(num_characters)
        if self.left_out is None and rules.measures_repetition:
            self.left_out = rules.repetition_reason(repetition(windows))


def _cut_again(slices: Iterator[str]) -> Iterator[str]:
    """The same text, cut where tokenizers cut."""
    text = next(slices)
    for following in slices:
        place = last_cut(text, 0, len(text)) or len(text)
        yield text[:place]
        text = text[place:] + following
    yield text


def _pieces(texts: Iterator[str], identity: str, facts: _Facts) -> Iterator[Piece]:
    starts, done = True, 0
    for text in texts:
        done += len(text.encode())
        piece = Piece(identity, text, starts=starts, ends=done == facts.num_bytes)
        if starts:
            piece = piece._replace(digest=facts.digest, num_bytes=facts.num_bytes)
        yield piece
        starts = False
