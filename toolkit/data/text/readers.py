"""From a shard to its documents, with every defect of the text named by file and place."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from toolkit.data.config import FilesSourceConfig, HubSourceConfig, SourceConfig
from toolkit.data.text.piece import Piece
from toolkit.data.text.sources import PIECE_BYTES, Range, Shard, align
from toolkit.errors import DataError

PARQUET_BATCH_ROWS = 256


class Counts:
    """What reading had to repair or leave out."""

    def __init__(self) -> None:
        self.replaced_bytes = 0
        self.skipped_documents = 0


def read_shard(shard: Shard, source: SourceConfig, counts: Counts) -> Iterator[Piece]:
    """The documents of a shard in order; documents without text are counted and left out.

    Raises:
        DataError: for text that cannot be used as the source's options say.
    """
    readers: dict[str, Callable[[Range, Any, Counts], Iterator[Piece]]] = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "jsonl_gz": _read_jsonl_gz,
        "parquet": _read_parquet,
    }
    if isinstance(source, HubSourceConfig):
        from toolkit.data.text.hub import read_hub

        readers["hub_stream"] = readers["hub_rows"] = read_hub
    for part in shard:
        try:
            for piece in readers[part.kind](part, source, counts):
                if piece.text or not (piece.starts and piece.ends):
                    yield piece
                else:
                    counts.skipped_documents += 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{part.path}: cannot be read: {reason}") from None


def decode(data: bytes, where: str, offset: int, errors: str, counts: Counts) -> str:
    """UTF-8 to text; `offset` is the position of `data` in the file `where`.

    Raises:
        DataError: for other bytes, unless `errors` is "replace" (then they are counted).
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if errors == "strict":
            position = offset + error.start
            raise DataError(
                f"{where}: not UTF-8 at byte {position} (0x{data[error.start]:02x}); convert the "
                "file, or set dataset.source.encoding_errors=replace"
            ) from None
    text, start = [], 0
    while True:
        try:
            text.append(data[start:].decode())
            return "".join(text)
        except UnicodeDecodeError as error:
            text.append(data[start : start + error.start].decode())
            text.append("\ufffd")
            counts.replaced_bytes += error.end - error.start
            start += error.end


def _read_text(part: Range, source: SourceConfig, counts: Counts) -> Iterator[Piece]:
    start, size = part.start, part.document_end
    is_stdlib = not isinstance(source, FilesSourceConfig)
    errors = source.encoding_errors if isinstance(source, FilesSourceConfig) else "strict"
    with open(part.path, "rb") as file:
        while start < part.end:
            end = min((start // PIECE_BYTES + 1) * PIECE_BYTES, part.end)
            first, last = align(part.path, start, size), align(part.path, end, size)
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
            yield Piece(
                part.name, text, part.split, start == part.document_start, end == part.document_end
            )
            start = end


def _read_jsonl(part: Range, source: FilesSourceConfig, counts: Counts) -> Iterator[Piece]:
    with open(part.path, "rb") as file:
        offset = part.start
        if offset:
            # A line belongs to the range that its first byte lies in.
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        yield from _json_lines(file, offset, part, part.end, source, counts)


def _read_jsonl_gz(part: Range, source: FilesSourceConfig, counts: Counts) -> Iterator[Piece]:
    try:
        with gzip.open(part.path, "rb") as file:
            yield from _json_lines(file, 0, part, None, source, counts)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{part.path}: damaged gzip file: {error}") from None


def _json_lines(
    file: Any,
    offset: int,
    part: Range,
    end: int | None,
    source: FilesSourceConfig,
    counts: Counts,
) -> Iterator[Piece]:
    row_type = msgspec.defstruct("Row", [("text", str | None)], rename={"text": source.text_field})
    decoder = msgspec.json.Decoder(row_type)
    while end is None or offset < end:
        line = file.readline()
        if not line:
            return
        text = decode(line, part.path, offset, source.encoding_errors, counts)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        if not text.isspace():
            try:
                value = decoder.decode(text).text  # type: ignore[attr-defined]
            except msgspec.DecodeError as error:
                value = _repaired(text, source, counts)
                if value is None:
                    raise _bad_line(part, offset, source.text_field, error) from None
            yield Piece(f"{part.name}:{offset}", value or "")
        offset += len(line)


def _repaired(text: str, source: FilesSourceConfig, counts: Counts) -> str | None:
    """The text of a line whose only defect are lone surrogates, where replacing is allowed."""
    if source.encoding_errors == "strict":
        return None
    try:
        value = json.loads(text)[source.text_field]
        data = value.encode("utf-8", "surrogatepass")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return decode(data, "", 0, "replace", counts)


def _bad_line(part: Range, offset: int, field: str, error: msgspec.DecodeError) -> DataError:
    opener = gzip.open if part.kind == "jsonl_gz" else open
    with opener(part.path, "rb") as file:
        number, position = 1, 0
        while position < offset:
            position += len(file.readline())
            number += 1
    if isinstance(error, msgspec.ValidationError):
        return DataError(
            f"{part.path}: line {number} (byte {offset}): no text under {field!r}: {error}; "
            "set dataset.source.text_field to the key that holds it"
        )
    return DataError(f"{part.path}: line {number} (byte {offset}): not valid JSON: {error}")


def parquet_row_groups(path: str, field: str, size: int) -> Iterator[tuple[int, int, int]]:
    """Runs of row groups (first, one past the last, bytes) of about `size` bytes of text.

    Raises:
        DataError: for a file that is not parquet, or has no text in column `field`.
    """
    file = _open_parquet(path)
    names = file.schema_arrow.names
    if field not in names:
        raise DataError(
            f"{path}: no column {field!r}; set dataset.source.text_field to one of: "
            f"{', '.join(names)}"
        )
    if str(file.schema_arrow.field(field).type) not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{path}: column {field!r} holds {file.schema_arrow.field(field).type}, not text; "
            "set dataset.source.text_field to a text column"
        )
    column = file.metadata.schema.names.index(field)
    first, num_bytes = 0, 0
    for group in range(file.metadata.num_row_groups):
        num_bytes += file.metadata.row_group(group).column(column).total_uncompressed_size
        if num_bytes >= size or group == file.metadata.num_row_groups - 1:
            yield first, group + 1, num_bytes
            first, num_bytes = group + 1, 0


def _read_parquet(part: Range, source: FilesSourceConfig, counts: Counts) -> Iterator[Piece]:
    import pyarrow

    file = _open_parquet(part.path)
    for group in range(part.start, part.end):
        row = 0
        try:
            for batch in file.iter_batches(
                PARQUET_BATCH_ROWS, row_groups=[group], columns=[source.text_field]
            ):
                column = batch.column(0)
                try:
                    values = column.to_pylist()
                except UnicodeDecodeError:
                    values = column.cast(pyarrow.binary()).to_pylist()
                for value in values:
                    identity = f"{part.name}:{group}:{row}"
                    if isinstance(value, bytes):
                        where = f"{part.path}: row group {group}, row {row}"
                        value = decode(value, where, 0, source.encoding_errors, counts)
                    yield Piece(identity, value or "")
                    row += 1
        except pyarrow.ArrowException as error:
            raise DataError(f"{part.path}: row group {group} cannot be read: {error}") from None


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file that can be read: {error}") from None
