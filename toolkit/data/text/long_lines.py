"""Documents of many megabytes on one line: their text is decoded slice by slice.

A whole decoded string would take up to four bytes a character on top of the line itself. The line
stays as it is in the file, once, and the JSON string in it is cut where that is safe: not inside a
character, not inside an escape.
"""

from collections.abc import Callable, Iterator

import msgspec

from toolkit.data.text.filters import MAX_SCORED_BYTES, DocumentFilter, repetition
from toolkit.data.text.piece import Piece
from toolkit.data.text.reading import PIECE_CHARACTERS, Counts, Reading

LONG_LINE_BYTES = 8 << 20
WINDOW_BYTES = 1 << 16
_SURROGATE_BYTES = 6


def read_line(file: "object", *, limit: int = LONG_LINE_BYTES) -> bytes | bytearray:
    """`file.readline()`, without holding a long line twice."""
    readline: Callable[[int], bytes] = file.readline  # type: ignore[attr-defined]
    line = readline(limit)
    if len(line) < limit or line.endswith(b"\n"):
        return line
    whole = bytearray(line)
    while line and not line.endswith(b"\n"):
        line = readline(limit)
        whole += line
    return whole


def read_long_line(
    line: bytes | bytearray, field: str, identity: str, reading: Reading, counts: Counts
) -> Iterator[Piece] | None:
    """The document under the key `field` of a JSON object, in pieces; None when the line is not
    what it should be, or holds no text: the ordinary reader finds out what it is.
    """
    row_type = msgspec.defstruct(
        "LongRow", [("text", msgspec.Raw)], rename={"text": field}, forbid_unknown_fields=False
    )
    try:
        raw = memoryview(msgspec.json.decode(line, type=row_type).text)  # type: ignore[attr-defined]
        if raw[:1] != b'"' or len(raw) < PIECE_CHARACTERS:
            return None
        facts = _Facts(raw[1:-1], reading)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    reason = facts.left_out
    if reason is not None:
        counts.leave_out(reason)
        return iter(())
    return _pieces(raw[1:-1], identity, facts)


class _Facts:
    """What filters and comparisons need to know of a whole document; one pass over it."""

    def __init__(self, raw: memoryview, reading: Reading) -> None:
        import xxhash

        rules = DocumentFilter(reading.filters)
        num_slices = -(-len(raw) // PIECE_CHARACTERS)
        window = MAX_SCORED_BYTES // num_slices
        digest = xxhash.xxh3_128()
        self.num_bytes = 0
        num_characters = 0
        windows = []
        for text in _slices(raw):
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


def _pieces(raw: memoryview, identity: str, facts: _Facts) -> Iterator[Piece]:
    starts, done = True, 0
    for text in _slices(raw):
        done += len(text.encode())
        piece = Piece(identity, text, starts=starts, ends=done == facts.num_bytes)
        if starts:
            piece = piece._replace(digest=facts.digest, num_bytes=facts.num_bytes)
        yield piece
        starts = False


def _slices(raw: memoryview) -> Iterator[str]:
    """The text of a JSON string's content."""
    start = 0
    while start < len(raw):
        end = start + PIECE_CHARACTERS
        end = len(raw) if end >= len(raw) else safe_cut(raw, start, end)
        yield msgspec.json.decode(b'"%b"' % bytes(raw[start:end]), type=str)
        start = end


def safe_cut(raw: memoryview, start: int, end: int) -> int:
    """A place in (start, end] where a JSON string's content may be cut in two: before a blank
    (tokenizers cut there by themselves), or at least not inside a character or an escape."""
    first = max(start + _SURROGATE_BYTES, end - WINDOW_BYTES)
    window = bytes(raw[first:end])
    blank = window.rfind(b" ")
    if blank > 0:
        return first + blank
    slash = first + window.rfind(b"\\")
    if slash >= first and end - slash < _SURROGATE_BYTES:
        if not _begins_escape(raw, start, slash):
            return slash + 1  # an escaped backslash, whole
        end = slash
    # After a high surrogate, its other half must follow.
    before = end - _SURROGATE_BYTES
    tail = bytes(raw[before:end]).lower()
    halves = (b"d8", b"d9", b"da", b"db")
    if tail[:2] == b"\\u" and tail[2:4] in halves and _begins_escape(raw, start, before):
        return before
    while raw[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _begins_escape(raw: memoryview, start: int, slash: int) -> bool:
    """Whether the backslash at `slash` is not itself escaped; `start` is a safe place before it."""
    data = bytes(raw[start : slash + 1])
    return (len(data) - len(data.rstrip(b"\\"))) % 2 == 1
