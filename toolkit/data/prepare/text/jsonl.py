"""JSON: an object a line (plain, .gz, .zst), or a list of objects in one file; a document each.

`msgspec` decodes. What it refuses is looked at again with Python's own parser, which knows numbers
that JSON does not have (NaN, Infinity, 1e999), and which names what is wrong with anything else.
"""

import contextlib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec
import zstandard

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.columns import text_columns
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, decode, row_piece
from toolkit.data.prepare.text.sources import Range
from toolkit.errors import DataError
from toolkit.storage.foreign import nesting

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_DEPTH = 100
"""Levels of lists and mappings in a row; Python's own recursion ends at some hundreds."""
BLOCK_BYTES = 1 << 20
ZSTD_BYTES = 1 << 10
"""Given to the zstd library at a time: it gives back all that comes out at once, which is 128 KB
for each 4 bytes at most."""
SKIPPED_BYTES = 1 << 16
"""Read at a time of a line that belongs to the range before."""
_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_SPACED_COLON = re.compile(rb'"\s+:')


def read_jsonl(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the lines whose first byte lies in `part`; all lines of a compressed
    file. A line is held in memory as a whole, up to `max_line_bytes`."""
    objects = _Objects(part, reading, counts)
    longest = objects.source.max_line_bytes
    end = part.end if part.kind == "jsonl" else None
    try:
        with _open(part) as file:
            offset = _first_line(file, part.start, part.end) if part.start else 0
            while end is None or offset < end:
                line = file.readline(longest + 1)
                if not line:
                    return
                if len(line) > longest:
                    raise DataError(
                        f"{part.path}: the line at byte {offset} has more than {longest:,} bytes; "
                        "cut it, or set dataset.source.max_line_bytes"
                    )
                if not line.isspace():
                    data = line if offset else line.removeprefix(_MARK)
                    yield objects.document(data, offset, offset, _Line(part, offset))
                offset += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        name = "gzip" if part.kind == "jsonl_gz" else "zstd"
        raise DataError(
            f"{part.path}: damaged {name} file: {error}; restore or unpack it anew"
        ) from None


def read_json_array(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the objects in the list that the file of `part` holds."""
    objects = _Objects(part, reading, counts)
    with open(part.path, "rb") as file:
        data = file.read().removeprefix(_MARK)
    text = decode(data, part.path, 0, objects.source.encoding_errors, counts)
    del data
    decoder, number = json.JSONDecoder(), 0
    place = _after_space(text, _after_space(text, 0) + 1)
    while text[place : place + 1] != "]":
        where = f"{part.path}: element {number}"
        try:
            _, end = decoder.raw_decode(text, place)
        except RecursionError:
            raise _too_deep(where) from None
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        yield objects.document(text[place:end].encode(), 0, number, where)
        number += 1
        place = _after_space(text, end)
        if text[place : place + 1] == ",":
            place = _after_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{where}: no comma or ] follows it; repair the file")
    rest = _after_space(text, place + 1)
    if rest < len(text):
        raise DataError(f"{part.path}: text follows the list ({text[rest : rest + 20]!r})")


def decode_json_loosely(data: bytes | str) -> Any:
    """The value of `data`, in which a number may be NaN or infinite; ValueError if there is none.
    RecursionError for one that is nested too deeply."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return json.loads(data)


class _Line(NamedTuple):
    """The place of a line, whose number is counted when somebody asks for it."""

    part: Range
    offset: int

    def __str__(self) -> str:
        with _open(self.part) as file:
            number, left = 1, self.offset
            while left and (data := file.read(min(left, BLOCK_BYTES))):
                number += data.count(b"\n")
                left -= len(data)
        return f"{self.part.path}: line {number} (byte {self.offset})"


class _Objects:
    """Makes documents of the objects of one range."""

    def __init__(self, part: Range, reading: Reading, counts: Counts) -> None:
        assert isinstance(reading.source, FilesSourceConfig)
        self.source, self._part, self._counts = reading.source, part, counts
        self._columns = text_columns(reading.source, rows=reading.rows)
        # One column is read without building the others.
        self._field: str | None = None
        self._type: Any = dict[str, Any]
        if self._columns is not None and not self._columns.is_template:
            self._field = reading.source.text_field
            self._quoted = msgspec.json.encode(self._field)
            self._type = msgspec.defstruct(
                "Row", [("text", str | None)], rename={"text": self._field}
            )
        self._decoder = msgspec.json.Decoder(self._type)

    def document(self, data: bytes, offset: int, number: int, place: object) -> Piece:
        """The document of the object in `data`, which begins at byte `offset` of the file and is
        identified by `number`. DataError, which names `place`, if it is none, or does not hold what
        is needed."""
        try:
            value = self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            errors = self.source.encoding_errors
            text = decode(data, self._part.path, offset, errors, self._counts)
            value, data = self._loosely(text, place), text.encode()
        repeated = self._repeated_key(data, value)
        if repeated is not None:
            raise DataError(
                f"{place}: the key {repeated!r} stands twice in one object, and only one value can "
                "be meant; take one out"
            )
        identity = f"{self._part.name}:{number}"
        if self._field is not None:
            return Piece(identity, value.text or "")
        if self._columns is None:
            if data.count(b"[") + data.count(b"{") > MAX_DEPTH and nesting(data) > MAX_DEPTH:
                raise _too_deep(place)
            return Piece(identity, row=value, num_bytes=len(data), place=place)
        return row_piece(value, identity, place, self._columns)

    def _loosely(self, text: str, place: object) -> Any:
        """The object in `text`, which `msgspec` does not take as it is."""
        try:
            value = json.loads(text)
            json.dumps(value, ensure_ascii=False).encode()
        except RecursionError:
            raise _too_deep(place) from None
        except UnicodeEncodeError:
            if self.source.encoding_errors == "strict":
                raise DataError(
                    f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                    "character; repair it, or set dataset.source.encoding_errors=replace"
                ) from None
            value = _without_surrogates(value, self._counts)
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON: {error}") from None
        field = self._field
        if field is not None and isinstance(value, dict) and value.get(field) != value.get(field):
            value[field] = None  # NaN
        try:
            return msgspec.convert(value, self._type)
        except msgspec.ValidationError as reason:
            if field is None:
                raise DataError(f"{place}: no object with columns: {reason}") from None
            raise DataError(
                f"{place}: no text under {field!r}: {reason}; set dataset.source.text_field to the "
                "key that holds it"
            ) from None

    def _repeated_key(self, data: bytes, value: Any) -> str | None:
        """A key that stands twice in an object of `data` whose keys are read."""
        field = self._field
        if field is not None:
            if data.count(self._quoted) < 2:
                return None
        # A key is followed by a colon; one inside of text has a backslash before the quote.
        elif data.count(b'":') == _num_keys(value) and not _SPACED_COLON.search(data):
            return None
        objects: list[list[str]] = []
        with contextlib.suppress(RecursionError):
            json.loads(
                data, object_pairs_hook=lambda pairs: objects.append([key for key, _ in pairs])
            )
        # The outermost object is the last one.
        for keys in objects if field is None else objects[-1:]:
            for key, number in Counter(keys).items():
                if number > 1 and field in (None, key):
                    return key
        return None


def _after_space(text: str, position: int) -> int:
    """The first place from `position` on that is no white space."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _too_deep(place: object) -> DataError:
    return DataError(f"{place}: nested deeper than {MAX_DEPTH} levels")


def _num_keys(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_num_keys, value.values()))
    return sum(map(_num_keys, value)) if isinstance(value, list) else 0


def _without_surrogates(value: Any, counts: Counts) -> Any:
    if isinstance(value, str):
        return decode(value.encode("utf-8", "surrogatepass"), "", 0, "replace", counts)
    if isinstance(value, dict):
        return {key: _without_surrogates(inner, counts) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(inner, counts) for inner in value]
    return value


def _first_line(file: IO[bytes], start: int, end: int) -> int:
    """The first place from `start` on where a line begins, and where `file` then stands; or one
    that is not before `end`: of a line that is longer than the range, no more is read."""
    file.seek(start - 1)
    offset, data = start - 1, b""
    while offset < end and not data.endswith(b"\n"):
        data = file.readline(SKIPPED_BYTES)
        if not data:
            return end
        offset += len(data)
    return offset


def _open(part: Range) -> Any:
    if part.kind == "jsonl_gz":
        return gzip.open(part.path, "rb")
    if part.kind == "jsonl_zst":
        return io.BufferedReader(_ZstdFile(part.path), BLOCK_BYTES)
    return open(part.path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompresses a zstd file, which may have several frames; one cut short is an error, which
    the readers of `zstandard` do not notice."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=BLOCK_BYTES)  # noqa: SIM115
        self._blocks, self._ready = self._unpacked(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._ready and (block := next(self._blocks, None)) is not None:
            self._ready = memoryview(block)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._ready))
        view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpacked(self) -> Iterator[bytes]:
        # Long-distance matching may need more than the library allows by default.
        context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frame, data = None, b""
        while data := data or self._file.read(ZSTD_BYTES):
            frame = frame or context.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends in the middle")
