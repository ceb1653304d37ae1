"""Documents of many megabytes on one line of JSON: the string is cut where that is safe, which is
not inside a character and not inside an escape, and decoded slice by slice."""

from collections.abc import Callable, Iterator

import msgspec

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.long_documents import LONG_BYTES, character_start, long_document
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.reading import PIECE_CHARACTERS, Counts, Reading, decode

_SURROGATE_BYTES = 6


class TooLongError(Exception):
    """A line is longer than it may be."""


def read_line(
    file: "object", *, max_bytes: int = 1 << 30, limit: int = LONG_BYTES
) -> bytes | bytearray:
    """`file.readline()`, without holding a long line twice.

    Raises:
        TooLongError: the line has more than `max_bytes`.
    """
    readline: Callable[[int], bytes] = file.readline  # type: ignore[attr-defined]
    limit = min(limit, max_bytes + 1)
    line = readline(limit)
    whole: bytes | bytearray = line
    if len(line) == limit and not line.endswith(b"\n"):
        whole = bytearray(line)
    while len(whole) <= max_bytes and len(line) == limit and not line.endswith(b"\n"):
        line = readline(limit)
        whole += line
    if len(whole) > max_bytes:
        raise TooLongError
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
    if line.count(msgspec.json.encode(field)) > 1:
        return None  # perhaps the key stands twice
    assert isinstance(reading.source, FilesSourceConfig)
    make = _strict_slice if reading.source.encoding_errors == "strict" else _lenient_slice
    try:
        raw = memoryview(msgspec.json.decode(line, type=row_type).text)  # type: ignore[attr-defined]
        if raw[:1] != b'"' or len(raw) < PIECE_CHARACTERS:
            return None
        content = raw[1:-1]

        def slices(counts: Counts) -> Iterator[str]:
            return (make(part, counts) for part in _parts(content))

        return long_document(slices, len(content), identity, reading, counts)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _parts(raw: memoryview) -> Iterator[bytes]:
    """Strings of JSON, whose texts together are that of the string with the content `raw`."""
    start = 0
    while start < len(raw):
        end = start + PIECE_CHARACTERS
        end = len(raw) if end >= len(raw) else safe_cut(raw, start, end)
        yield b'"%b"' % bytes(raw[start:end])
        start = end


def _strict_slice(part: bytes, counts: Counts) -> str:
    return msgspec.json.decode(part, type=str)


def _lenient_slice(part: bytes, counts: Counts) -> str:
    try:
        return msgspec.json.decode(part, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(decode(part, "", 0, "replace", counts), type=str)


def safe_cut(raw: memoryview, start: int, end: int) -> int:
    """A place in (start, end] where a JSON string's content may be cut in two: not inside a
    character or an escape."""
    first = max(start + 1, end - _SURROGATE_BYTES)
    slash = first + bytes(raw[first:end]).rfind(b"\\")
    if slash >= first:
        if not _begins_escape(raw, start, slash):
            return slash + 1  # an escaped backslash, whole
        end = slash
    # After a high surrogate, its other half must follow.
    before = end - _SURROGATE_BYTES
    tail = bytes(raw[before:end]).lower()
    halves = (b"d8", b"d9", b"da", b"db")
    if tail[:2] == b"\\u" and tail[2:4] in halves and _begins_escape(raw, start, before):
        return before
    return character_start(raw, end)


def _begins_escape(raw: memoryview, start: int, slash: int) -> bool:
    """Whether the backslash at `slash` is not itself escaped; `start` is a safe place before it."""
    data = bytes(raw[start : slash + 1])
    return (len(data) - len(data.rstrip(b"\\"))) % 2 == 1
