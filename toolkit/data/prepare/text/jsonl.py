"""Lines of JSON, plain or compressed: one document a line."""

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.columns import TextColumns
from toolkit.data.prepare.text.json_text import (
    TooDeepError,
    decode_loosely,
    repeated_key,
    repeats_field,
)
from toolkit.data.prepare.text.long_documents import LONG_BYTES
from toolkit.data.prepare.text.long_lines import TooLongError, read_line, read_long_line
from toolkit.data.prepare.text.piece import Piece, at_found_place
from toolkit.data.prepare.text.reading import Counts, Reading, decode
from toolkit.data.prepare.text.shards import Range
from toolkit.data.prepare.text.table_checks import MAX_DEPTH, is_deep
from toolkit.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED_BYTES = 1 << 20
"""Read from a compressed file at a time."""
ZSTD_BYTES = 1 << 10
"""Given to the zstd library at a time: it gives back all that comes out at once, which is 128 KB
for each 4 bytes at most."""
SKIPPED_BYTES = 1 << 16
"""Read at a time of a line that belongs to the range before."""

_File = BinaryIO | io.BufferedReader | gzip.GzipFile


def read_jsonl(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the lines whose first byte lies in `part`; all lines of a compressed
    file."""
    lines = ObjectReader(part, reading, counts)
    try:
        with _open(part) as file:
            end = part.end if part.kind == "jsonl" else None
            offset = _first_line(file, part.start, part.end) if part.start else 0
            while end is None or offset < end:
                line = read_line(file, max_bytes=lines.max_bytes)
                if not line:
                    return
                offset += len(line)
                if not line.isspace():
                    yield from lines.pieces(line, offset - len(line))
    except TooLongError:
        raise DataError(
            f"{part.path}: the line at byte {offset} has more than {lines.max_bytes:,} bytes; cut "
            "it, or set dataset.source.max_line_bytes"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedZstd) as error:
        name = "gzip" if part.kind == "jsonl_gz" else "zstd"
        raise DataError(
            f"{part.path}: damaged {name} file: {error}; restore or unpack it anew"
        ) from None


def _first_line(file: _File, start: int, end: int) -> int:
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


class ObjectReader:
    """Makes documents of the objects of one range."""

    def __init__(self, part: Range, reading: Reading, counts: Counts) -> None:
        source = reading.source
        assert isinstance(source, FilesSourceConfig)
        self._part, self._source = part, source
        self.max_bytes = source.max_line_bytes
        self._reading, self._counts = reading, counts
        self._columns = None if reading.rows else TextColumns(source)
        self._rows = msgspec.json.Decoder(dict[str, Any])
        # One column is read without building the others.
        self._field: msgspec.json.Decoder[Any] | None = None
        if self._columns is not None and not self._columns.is_template:
            row_type = msgspec.defstruct(
                "Row", [("text", str | None)], rename={"text": source.text_field}
            )
            self._field = msgspec.json.Decoder(row_type)

    def pieces(self, line: bytes | bytearray, offset: int) -> Iterator[Piece]:
        """The document of `line`, which begins at byte `offset`."""
        identity = f"{self._part.name}:{offset}"
        if offset == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) >= LONG_BYTES and self._field is not None:
            field = self._source.text_field
            found = read_long_line(line, field, identity, self._reading, self._counts)
            if found is not None:
                yield from found
                return
        where = functools.partial(self._line, offset)
        yield self.piece(line, offset, identity, f"{self._part.path}: byte {offset}", where)

    def piece(
        self,
        line: bytes | bytearray,
        offset: int,
        identity: str,
        place: str,
        where: Callable[[], str],
    ) -> Piece:
        """The document of the object in `line`.

        Args:
            offset: of `line` in the file.
            place, where: name it in messages: of a row, and in words that take time to find.

        Raises:
            DataError: it is no object, or does not hold what is needed.
        """
        try:
            value = self._decode(line, place, where)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            errors = self._source.encoding_errors
            text = decode(bytes(line), self._part.path, offset, errors, self._counts)
            try:
                value = self._decode(text.encode("utf-8", "surrogatepass"), place, where)
            except (msgspec.DecodeError, RecursionError) as error:
                repaired = self._repaired(text, place)
                if repaired is None:
                    raise self._bad_line(text, where(), error) from None
                value = repaired
        if isinstance(value, dict):
            if is_deep(line):
                raise too_deep(where())
            return Piece(identity, row=value, num_bytes=len(line), place=place, find_place=where)
        return Piece(identity, value)

    def _decode(
        self, line: bytes | bytearray, place: str, where: Callable[[], str]
    ) -> str | dict[str, Any]:
        field = self._source.text_field
        if self._field is not None:
            if repeats_field(line, field):
                raise _repeats(where(), field)
            found = decode_loosely(line, self._field)
            if not isinstance(found, dict):
                return found.text or ""
            row = found
        else:
            row = decode_loosely(line, self._rows)
            repeated = repeated_key(line, row) if isinstance(row, dict) else None
            if repeated is not None:
                raise _repeats(where(), repeated)
        if not isinstance(row, dict):
            raise msgspec.ValidationError(f"Expected `object`, got {type(row).__name__}")
        if self._columns is None:
            return row
        try:
            return self._columns.text(row, place)
        except DataError as error:
            raise at_found_place(error, place, where) from None

    def _repaired(self, text: str, place: str) -> str | dict[str, Any] | None:
        """The document of a line whose only defect are lone surrogates, where replacing them is
        allowed."""
        if self._source.encoding_errors == "strict":
            return None
        try:
            row = json.loads(text)
            value = _without_surrogates(row, self._counts)
            return value if self._columns is None else self._columns.text(value, place)
        except (ValueError, DataError, TypeError, RecursionError):
            return None

    def _line(self, offset: int) -> str:
        with _open(self._part) as file:
            number, left = 1, offset
            while left and (data := file.read(min(left, COMPRESSED_BYTES))):
                number += data.count(b"\n")
                left -= len(data)
        return f"{self._part.path}: line {number} (byte {offset})"

    def _bad_line(self, text: str, where: str, error: Exception) -> DataError:
        if isinstance(error, RecursionError | TooDeepError):
            return too_deep(where)
        if not isinstance(error, msgspec.ValidationError):
            if self._source.encoding_errors == "strict" and _holds_surrogate(text):
                return DataError(
                    f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                    "character; repair it, or set dataset.source.encoding_errors=replace"
                )
            return DataError(f"{where}: not valid JSON: {error}")
        if self._field is None:
            return DataError(f"{where}: no object with columns: {error}")
        return DataError(
            f"{where}: no text under {self._source.text_field!r}: {error}; set "
            "dataset.source.text_field to the key that holds it"
        )


def too_deep(where: str) -> DataError:
    """The error for an object with more levels than are read."""
    return DataError(f"{where}: nested deeper than {MAX_DEPTH} levels")


def _repeats(where: str, key: str) -> DataError:
    return DataError(
        f"{where}: the key {key!r} stands twice in one object, and only one value can be meant; "
        "take one out"
    )


def _holds_surrogate(text: str) -> bool:
    """Whether this is JSON with strings that are no text."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        pass
    return False


def _without_surrogates(value: Any, counts: Counts) -> Any:
    if isinstance(value, str):
        return decode(value.encode("utf-8", "surrogatepass"), "", 0, "replace", counts)
    if isinstance(value, dict):
        return {key: _without_surrogates(inner, counts) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(inner, counts) for inner in value]
    return value


class _DamagedZstd(Exception):
    pass


class _ZstdFile(io.RawIOBase):
    """Decompresses a zstd file, which may have several frames; one cut short is an error."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._error = zstandard.ZstdError
        # Long-distance matching may need more than the library allows by default.
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._compressed, self._place = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._ready:
            if self._place == len(self._compressed):
                self._compressed, self._place = self._file.read(COMPRESSED_BYTES), 0
            data = self._compressed[self._place : self._place + ZSTD_BYTES]
            self._place += len(data)
            if not data:
                if self._frame is not None:
                    raise _DamagedZstd("it ends in the middle")
                return 0
            if self._frame is None:
                self._frame = self._context.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise _DamagedZstd(str(error)) from None
            if self._frame.eof:
                self._place -= len(self._frame.unused_data)
                self._frame = None
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(part: Range) -> _File:
    if part.kind == "jsonl_gz":
        return gzip.open(part.path, "rb")
    if part.kind == "jsonl_zst":
        return io.BufferedReader(_ZstdFile(part.path), COMPRESSED_BYTES)
    return open(part.path, "rb")
