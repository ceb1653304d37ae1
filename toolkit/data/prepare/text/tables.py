"""Tables in files: parquet, and Arrow's file and stream formats (as `datasets` writes them)."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.columns import TextColumns
from toolkit.data.prepare.text.long_documents import LONG_BYTES, long_document, utf8_slices
from toolkit.data.prepare.text.nested import Convert, conversion
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.reading import Counts, Reading, decode
from toolkit.data.prepare.text.shards import Range
from toolkit.data.prepare.text.table_checks import check_depth, checked_batch
from toolkit.errors import DataError
from toolkit.storage.foreign import reason_of

BATCH_ROWS = 256
BATCH_BYTES = 4 << 20
"""Rows are taken out of a file about so many bytes at a time, and not more than `BATCH_ROWS`."""
READ_BYTES = 1 << 20
"""Read of each column of a parquet file at a time."""
_TEXT_TYPES = ("string", "large_string", "string_view")
_ARROW_MAGIC = b"ARROW1"


def parquet_row_groups(
    path: str, columns: TextColumns | None, size: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of row groups (first, one past the last, bytes) of about `size` bytes of text.

    Raises:
        DataError: for a file that is not parquet, or lacks the columns.
    """
    file = _open_parquet(path)
    check_depth(file.schema_arrow, path)
    _check_schema(file.schema_arrow, columns, path)
    leaves = _leaves(file, columns)
    first, num_bytes = 0, 0
    for group in range(file.metadata.num_row_groups):
        num_bytes += _group_bytes(file.metadata.row_group(group), leaves)
        if num_bytes >= size or group == file.metadata.num_row_groups - 1:
            yield first, group + 1, num_bytes
            first, num_bytes = group + 1, 0


def arrow_batches(
    path: str, columns: TextColumns | None, size: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of record batches, like `parquet_row_groups`."""
    first, num_bytes, number = 0, 0, -1
    with _arrow(path) as (schema, batches):
        _check_schema(schema, columns, path)
        check_depth(schema, path)
        for number, batch in enumerate(batches(0)):
            # The values are checked where they are read.
            checked_batch(batch, f"{path}: batch {number}", full=False)
            chosen = batch.select(columns.names) if columns is not None else batch
            num_bytes += max(1, chosen.nbytes)
            if num_bytes >= size:
                yield first, number + 1, num_bytes
                first, num_bytes = number + 1, 0
    if num_bytes:
        yield first, number + 1, num_bytes


def read_parquet(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the row groups of `part`."""
    import pyarrow

    columns = _columns(reading)
    file = _open_parquet(part.path)
    for group in range(part.start, part.end):
        row = 0
        try:
            metadata = file.metadata.row_group(group)
            some = _batch_rows(metadata.num_rows, _group_bytes(metadata, _leaves(file, columns)))
            for batch in file.iter_batches(
                some,
                row_groups=[group],
                columns=columns.names if columns else None,
                use_threads=False,
            ):
                batch = checked_batch(batch, f"{part.path}: row group {group}")
                where = f"{part.path}: row group {group}, row"
                prefix = f"{part.name}:{group}"
                yield from _pieces(batch, columns, prefix, where, row, reading, counts)
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(
                f"{part.path}: row group {group} cannot be read: {reason_of(error)}"
            ) from None


def read_arrow(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the record batches of `part`."""
    columns = _columns(reading)
    with _arrow(part.path) as (_, batches):
        for number, batch in enumerate(batches(part.start), part.start):
            if number >= part.end:
                return
            if columns is not None:
                batch = batch.select(columns.names)
            batch = checked_batch(batch, f"{part.path}: batch {number}")
            where = f"{part.path}: batch {number}, row"
            prefix = f"{part.name}:{number}"
            yield from _pieces(batch, columns, prefix, where, 0, reading, counts)


def check_arrow_file(path: str) -> None:
    """Raise DataError, which names the batch, for the first that is damaged."""
    with _arrow(path) as (_, batches):
        for number, batch in enumerate(batches(0)):
            checked_batch(batch, f"{path}: batch {number}")


def _pieces(
    batch: Any,
    columns: TextColumns | None,
    prefix: str,
    where: str,
    first: int,
    reading: Reading,
    counts: Counts,
) -> Iterator[Piece]:
    assert isinstance(reading.source, FilesSourceConfig)
    errors = reading.source.encoding_errors
    names, arrays = batch.schema.names, batch.columns
    conversions = [conversion(array.type) for array in arrays]
    text = arrays[0] if columns is not None and not columns.is_template else None
    # One row after the other: the batch itself may be mapped memory, Python's strings are not.
    for index in range(batch.num_rows):
        number = first + index
        identity, place = f"{prefix}:{number}", f"{where} {number}"
        if text is not None:
            data = text[index].as_buffer()
            if data is not None and data.size > LONG_BYTES:
                make = functools.partial(utf8_slices, memoryview(data), place, errors)
                yield from long_document(make, data.size, identity, reading, counts)
                continue
        row = {
            name: _value(array[index], convert, place, errors, counts)
            for name, array, convert in zip(names, arrays, conversions, strict=True)
        }
        if columns is None:
            yield Piece(identity, row=row, place=place)
        else:
            yield Piece(identity, columns.text(row, place))


def _value(scalar: Any, convert: Convert | None, place: str, errors: str, counts: Counts) -> Any:
    try:
        value = scalar.as_py()
        return value if convert is None else convert(value, place)
    except UnicodeDecodeError:
        if str(scalar.type) in _TEXT_TYPES:
            return decode(scalar.as_buffer().to_pybytes(), place, 0, errors, counts)
        # Text inside of lists cannot be had as bytes.
        raise DataError(f"{place}: not UTF-8; convert the file") from None


def _leaves(file: Any, columns: TextColumns | None) -> list[int]:
    names = file.metadata.schema.names
    # A nested column has several leaves, none of which may have its name.
    return [names.index(n) for n in (columns.names if columns else names) if n in names]


def _group_bytes(metadata: Any, leaves: list[int]) -> int:
    return sum(metadata.column(leaf).total_uncompressed_size for leaf in leaves)


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    return min(max(1, BATCH_BYTES * num_rows // max(1, num_bytes)), BATCH_ROWS)


def _columns(reading: Reading) -> TextColumns | None:
    assert isinstance(reading.source, FilesSourceConfig)
    return None if reading.rows else TextColumns(reading.source)


def _check_schema(schema: Any, columns: TextColumns | None, path: str) -> None:
    if columns is None:
        return
    columns.check(schema.names, path)
    for name in columns.names:
        kind = str(schema.field(name).type)
        if kind not in _TEXT_TYPES and not columns.is_template:
            raise DataError(
                f"{path}: column {name!r} holds {kind}, not text; set dataset.source.text_field "
                f"to a text column; its columns: {', '.join(schema.names)}"
            )


@contextlib.contextmanager
def _arrow(path: str) -> Iterator[tuple[Any, Any]]:
    """Schema of an Arrow file and `batches(first)`, which gives its record batches from `first`
    on. The file is mapped into memory, so that batches are passed over without being read."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(path, "rb") as file:
            is_file = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
            file.seek(0)
            if is_file:
                whole = pyarrow.ipc.open_file(file)

                def batches(first: int) -> Iterator[Any]:
                    return map(whole.get_batch, range(first, whole.num_record_batches))

                yield whole.schema, batches
            else:
                stream = pyarrow.ipc.open_stream(file)

                def stream_batches(first: int) -> Iterator[Any]:
                    for number, batch in enumerate(stream):
                        if number >= first:
                            yield batch

                yield stream.schema, stream_batches
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path}: damaged, or not an Arrow file: {reason_of(error)}") from None


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path}: not a parquet file that can be read: {reason_of(error)}"
        ) from None
