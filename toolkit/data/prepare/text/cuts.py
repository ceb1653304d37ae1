"""Where long texts are cut: into documents of at most about 8 MB, and these into pieces for the
encoder, at places where the word patterns of tokenizers cut by themselves.

Three kinds of places for pieces are sought, and the first kind that is near is taken:

1. before a single blank between two other characters: it begins a word in the patterns of GPT-2
   and all that came after it, and nothing is joined over it;
2. after a single line feed between two other characters: it ends a word, or is one. Before
   indentation or an empty line it would be joined with what follows; some patterns take a slash
   to it;
3. in writing without blanks, before a mark of punctuation between two letters: it is a word (GPT-2)
   or begins one (cl100k and later).

A text without any of them is cut between two characters, and the tokens there may differ from those
of the text in one piece.
"""

import re
from collections.abc import Callable, Iterator

MAX_DOCUMENT_BYTES = 8 << 20
"""A longer text becomes several documents, so that one always fits into memory."""
PIECE_CHARACTERS = 1 << 18
"""Longer documents are encoded in pieces of about this size."""
NARROW = 1 << 11
"""Characters looked at first..."""
WIDE = 1 << 16
"""...and, where they have no good place, at most."""

_PLACES = (
    re.compile(r"(?<=\S)(?= \S)"),
    re.compile(r"(?<=\S\n)(?=[^\s/])"),
    re.compile(r"(?<=[^\W_])(?=[、。，．：；！？।،؛؟።၊][^\W_])"),
)


def last_cut(text: str, first: int, end: int) -> int | None:
    """The last good place after `first` and before `end`; None where none is near `end`."""
    for width in (NARROW, WIDE):
        start = max(first + 1, end - width)
        for kind in _PLACES:
            place = None
            for place in kind.finditer(text, start, end):  # noqa: B007
                pass
            if place is not None:
                return place.start()
        if start == first + 1:
            break
    return None


def pieces_of(text: str) -> Iterator[tuple[int, int]]:
    """First character of each piece of a document, and one past its last."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        end = (last_cut(text, start, end) or end) if end < len(text) else len(text)
        yield start, end
        start = end


Read = Callable[[int, int], bytes]
"""From a position in a text of bytes, so many of them."""


def align(read: Read, position: int, size: int) -> int:
    """The place at or after `position` where a text may become two documents: after a line end if
    one is near, else between two UTF-8 characters."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    window = read(position - 1, 1 << 16)
    line_end = window.find(b"\n")
    if line_end >= 0:
        return min(position + line_end, size)
    offset = 1
    while offset < min(len(window), 4) and window[offset] & 0xC0 == 0x80:
        offset += 1
    return min(position - 1 + offset, size)


def documents_in(read: Read, start: int, end: int) -> Iterator[tuple[int, int]]:
    """First byte and end of each document that bytes `start` to `end` of a text become."""
    while end - start > MAX_DOCUMENT_BYTES:
        place = align(read, start + MAX_DOCUMENT_BYTES, end)
        yield start, place
        start = place
    if start < end:
        yield start, end
