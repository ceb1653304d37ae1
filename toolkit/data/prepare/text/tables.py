"""Tables in files: parquet, Arrow's file and stream formats, and folders of those that `datasets`
saved.

Arrow's readers trust what a file says of itself: an offset that points beyond its buffer reads what
else is in memory, or ends the process. So every batch is checked before a value of it is looked at.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pyarrow.types

from toolkit.data.config import DiskSourceConfig, FilesSourceConfig
from toolkit.data.prepare.text.columns import TextColumns, text_columns
from toolkit.data.prepare.text.files import disk_folder, fingerprint_files, list_files
from toolkit.data.prepare.text.jsonl import MAX_DEPTH, decode_json_loosely
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, decode, row_piece
from toolkit.data.prepare.text.sources import Plan, Range, row_shards
from toolkit.errors import DataError
from toolkit.storage.foreign import read_json, reason_of

BATCH_ROWS = 256
BATCH_BYTES = 4 << 20
"""Rows are taken out of a file about so many bytes at a time, and not more than `BATCH_ROWS`."""
READ_BYTES = 1 << 20
"""Read of each column of a parquet file at a time."""
_TEXT_TYPES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}
"""Types of text, and of the bytes that it consists of."""
_ARROW_MAGIC = b"ARROW1"


@contextlib.contextmanager
def _named(problem: str) -> Iterator[None]:
    """Failures of the library become a DataError that begins with `problem`; those of the system,
    as of a file that is gone, pass."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{problem}: {reason_of(error)}") from None


def parquet_ranges(
    path: str, columns: TextColumns | None, size: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of row groups (first, one past the last, bytes) of about `size` bytes of text; DataError
    for a file that is not parquet, or lacks the columns."""
    file = _open_parquet(path)
    _check_schema(file.schema_arrow, columns, path)
    sizes = (_group_bytes(file, group, columns) for group in range(file.metadata.num_row_groups))
    yield from _runs(sizes, size)


def arrow_ranges(
    path: str, columns: TextColumns | None, size: int
) -> Iterator[tuple[int, int, int]]:
    """Runs of record batches, like `parquet_ranges`."""
    with _arrow(path) as (schema, batches):
        _check_schema(schema, columns, path)

        def sizes() -> Iterator[int]:
            for number, batch in enumerate(batches(0)):
                # The values are checked where they are read.
                checked_batch(batch, f"{path}: batch {number}", full=False)
                yield max(1, (batch.select(columns.names) if columns else batch).nbytes)

        yield from _runs(sizes(), size)


def _runs(sizes: Iterator[int], size: int) -> Iterator[tuple[int, int, int]]:
    first, num_bytes, number = 0, 0, -1
    for number, more in enumerate(sizes):
        num_bytes += more
        if num_bytes >= size:
            yield first, number + 1, num_bytes
            first, num_bytes = number + 1, 0
    if first <= number:
        yield first, number + 1, num_bytes


def read_parquet(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the row groups of `part`."""
    rows = _Rows(part, reading, counts)
    file = _open_parquet(part.path)
    for group in range(part.start, part.end):
        where, first = f"{part.path}: row group {group}", 0
        with _named(f"{where} cannot be read"):
            num_rows = file.metadata.row_group(group).num_rows
            num_bytes = max(1, _group_bytes(file, group, rows.columns))
            for batch in file.iter_batches(
                min(max(1, BATCH_BYTES * num_rows // num_bytes), BATCH_ROWS),
                row_groups=[group],
                columns=rows.names,
                use_threads=False,
            ):
                yield from rows.of(batch, f"{rows.name}:{group}", where, first)
                first += batch.num_rows


def read_arrow(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the record batches of `part`."""
    rows = _Rows(part, reading, counts)
    with _arrow(part.path) as (_, batches):
        for number, batch in enumerate(batches(part.start), part.start):
            if number >= part.end:
                return
            prefix, where = f"{rows.name}:{number}", f"{part.path}: batch {number}"
            yield from rows.of(rows.chosen(batch), prefix, where, 0)


def plan_disk(source: DiskSourceConfig, columns: TextColumns | None) -> Plan:
    """Ranges of the rows of a folder that `datasets.Dataset.save_to_disk` wrote; DataError when it
    holds no such data set, split or column."""
    listing = list_files(source)
    num_rows, num_bytes = 0, sum(file.num_bytes for file in listing.files)
    for path in _saved_files(source):
        with _arrow(path) as (schema, batches):
            _check_schema(schema, columns, path)
            num_rows += sum(batch.num_rows for batch in batches(0))
    name = f"{Path(source.path).name}/{source.split}"
    shards = row_shards("disk_rows", source.path, name, num_rows, num_bytes)
    return Plan(shards, fingerprint_files(listing.files), num_bytes, listing)


def read_disk(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of the rows of `part`."""
    assert isinstance(reading.source, DiskSourceConfig)
    rows, first = _Rows(part, reading, counts), 0
    for path in _saved_files(reading.source):
        with _arrow(path) as (_, batches):
            for number, batch in enumerate(batches(0)):
                start, end = max(part.start - first, 0), min(part.end - first, batch.num_rows)
                if start < end:
                    chosen = rows.chosen(batch.slice(start, end - start))
                    where = f"{path}: batch {number}"
                    yield from rows.of(chosen, part.name, where, first + start)
                first += batch.num_rows
                if first >= part.end:
                    return


def _saved_files(source: DiskSourceConfig) -> list[str]:
    """The Arrow files of a saved data set in the order of its rows."""
    folder = disk_folder(source)
    state = read_json(folder / "state.json", DataError, _Saved)
    is_whole = folder == Path(source.path).expanduser()
    if is_whole and source.split not in ("train", state.split):
        was = f" (it was {state.split})" if state.split is not None else ""
        raise DataError(
            f"dataset.source.split: {source.path} is one data set, without splits{was}, and "
            f"{source.split!r} was asked for; leave dataset.source.split out"
        )
    return [str(folder / file["filename"]) for file in state.data_files]


class _Saved(msgspec.Struct):
    """Content of state.json."""

    data_files: list[dict[str, str]] = msgspec.field(name="_data_files")
    split: str | None = msgspec.field(name="_split", default=None)


class _Rows:
    """Makes documents of the rows of one range."""

    def __init__(self, part: Range, reading: Reading, counts: Counts) -> None:
        source = reading.source
        assert isinstance(source, FilesSourceConfig | DiskSourceConfig)
        self.name, self._counts = part.name, counts
        self._errors = getattr(source, "encoding_errors", "strict")
        self.columns = text_columns(source, rows=reading.rows)
        self.names = None if self.columns is None else self.columns.names

    def chosen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The columns of `batch` that are read."""
        return batch if self.names is None else batch.select(self.names)

    def of(self, batch: pa.RecordBatch, prefix: str, where: str, first: int) -> Iterator[Piece]:
        """The documents of a batch, identified by `prefix` and their rows; `first` is its first."""
        checked_batch(batch, where)
        # One row after the other: the batch itself may be mapped memory, Python's strings are not.
        for index in range(batch.num_rows):
            place = f"{where}, row {first + index}"
            row = {
                name: self._value(array[index], place)
                for name, array in zip(batch.schema.names, batch.columns, strict=True)
            }
            yield row_piece(row, f"{prefix}:{first + index}", place, self.columns)

    def _value(self, scalar: pa.Scalar, place: str) -> Any:
        try:
            return _as_json(scalar.as_py(), scalar.type, place)
        except UnicodeDecodeError:
            if scalar.type in _TEXT_TYPES:
                data = scalar.as_buffer().to_pybytes()
                return decode(data, place, 0, self._errors, self._counts)
            # Text inside of lists cannot be had as bytes.
            raise DataError(f"{place}: not UTF-8; convert the file") from None


def checked_batch(batch: pa.RecordBatch, where: str, *, full: bool = True) -> pa.RecordBatch:
    """`batch`, of which every offset, length, index and null count has been checked, or DataError.
    Texts are checked as bytes: whether they are UTF-8 is asked where they are read. Without `full`,
    only the sizes of buffers are looked at."""
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            # Of the array as it is, no more than sizes: a view needs buffers that are there.
            array.validate()
            if full:
                array = array.storage if isinstance(array, pa.ExtensionArray) else array
                kind = _bytes_type(array.type)
                (array if kind == array.type else array.view(kind)).validate(full=True)
        except (pa.ArrowException, ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: column {name!r} is damaged: {reason_of(error)}; restore the file"
            ) from None
    return batch


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    """`kind` with bytes in the place of texts."""
    types = pa.types
    if types.is_struct(kind):
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_bytes_type(kind.key_type), _bytes_type(kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        field = kind.value_field.with_type(_bytes_type(kind.value_type))
        if types.is_fixed_size_list(kind):
            return pa.list_(field, kind.list_size)
        return pa.list_(field) if types.is_list(kind) else pa.large_list(field)
    return _TEXT_TYPES.get(kind, kind)


def _as_json(value: Any, kind: pa.DataType, place: str) -> Any:
    """What `as_py` gives for a value of an Arrow type, as the same rows have it in JSON Lines: a
    map is read as a list of pairs, and `datasets` writes objects of mixed kinds as text with the
    extension type `arrow.json`."""
    if value is None or _is_as_json(kind):
        return value
    if _is_json_text(kind):
        try:
            return decode_json_loosely(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: a value of type arrow.json is not valid JSON: {reason_of(error)}"
            ) from None
    if pa.types.is_map(kind):
        found: dict[Any, Any] = {}
        for key, inner in value:
            if key in found:
                raise DataError(f"{place}: the key {key!r} stands twice in one map; repair the row")
            found[key] = _as_json(inner, kind.item_type, place)
        return found
    if pa.types.is_struct(kind):
        return {field.name: _as_json(value[field.name], field.type, place) for field in kind}
    return [_as_json(inner, kind.value_type, place) for inner in value]


@functools.cache
def _is_as_json(kind: pa.DataType) -> bool:
    """Whether `as_py` gives all values of a type as JSON has them."""
    if _is_json_text(kind) or pa.types.is_map(kind):
        return False
    return all(_is_as_json(kind.field(number).type) for number in range(kind.num_fields))


def _is_json_text(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _check_schema(schema: pa.Schema, columns: TextColumns | None, path: str) -> None:
    """The columns are there, and not nested deeper than `MAX_DEPTH`."""
    level: list[Any] = list(schema.types)
    for _ in range(MAX_DEPTH):
        level = [kind.field(number).type for kind in level for number in range(kind.num_fields)]
    if level:
        raise DataError(f"{path}: its columns are nested deeper than {MAX_DEPTH} levels")
    if columns is None:
        return
    columns.check(schema.names, path)
    for name in columns.names:
        kind = schema.field(name).type
        if kind not in _TEXT_TYPES and not columns.is_template:
            raise DataError(
                f"{path}: column {name!r} holds {kind}, not text; set dataset.source.text_field "
                f"to a text column; its columns: {', '.join(schema.names)}"
            )


@contextlib.contextmanager
def _arrow(path: str) -> Iterator[tuple[pa.Schema, Callable[[int], Iterator[pa.RecordBatch]]]]:
    """Schema of an Arrow file and `batches(first)`, which gives its record batches from `first`
    on. The file is mapped into memory, so that batches are passed over without being read."""
    with _named(f"{path}: damaged, or not an Arrow file"), pa.memory_map(path, "rb") as file:
        is_file = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        file.seek(0)
        opened = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)

        def batches(first: int) -> Iterator[pa.RecordBatch]:
            if is_file:
                return map(opened.get_batch, range(first, opened.num_record_batches))
            return itertools.islice(opened, first, None)

        yield opened.schema, batches


def _open_parquet(path: str) -> pa.parquet.ParquetFile:
    with _named(f"{path}: not a parquet file that can be read"):
        return pa.parquet.ParquetFile(path, buffer_size=READ_BYTES)


def _group_bytes(file: pa.parquet.ParquetFile, group: int, columns: TextColumns | None) -> int:
    metadata, names = file.metadata.row_group(group), file.metadata.schema.names
    # A nested column has several leaves, none of which may have its name.
    leaves = [names.index(n) for n in (columns.names if columns else names) if n in names]
    return sum(metadata.column(leaf).total_uncompressed_size for leaf in leaves)
