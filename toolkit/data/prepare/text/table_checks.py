"""Tables from files, checked before a value of them is looked at.

Arrow's readers trust what a file says of itself: an offset that points beyond its buffer reads what
else is in memory, or ends the process.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError
from toolkit.storage.foreign import nesting, reason_of

if TYPE_CHECKING:
    import pyarrow

MAX_DEPTH = 100
"""Levels of lists and mappings in a row; Python's own recursion ends at some hundreds."""


def checked_batch(
    batch: "pyarrow.RecordBatch", where: str, *, full: bool = True
) -> "pyarrow.RecordBatch":
    """`batch`, of which every offset, length, index and null count has been checked.

    Texts are checked as bytes: whether they are UTF-8 is asked where they are read.

    Args:
        full: look at values too, not at the sizes of buffers only.

    Raises:
        DataError: naming `where`.
    """
    import pyarrow

    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            # Of the array as it is, no more than sizes: a view needs buffers that are there.
            array.validate()
            if full:
                _as_bytes(array).validate(full=True)
        except (pyarrow.ArrowException, ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: column {name!r} is damaged: {reason_of(error)}; restore the file"
            ) from None
    return batch


def check_depth(schema: "pyarrow.Schema", where: str) -> None:
    """Raise DataError for columns nested deeper than `MAX_DEPTH`."""
    level: list[Any] = list(schema.types)
    for _ in range(MAX_DEPTH):
        level = [child for kind in level for child in _children(kind)]
        if not level:
            return
    raise DataError(f"{where}: its columns are nested deeper than {MAX_DEPTH} levels")


def is_deep(data: bytes | bytearray) -> bool:
    """Whether the JSON value `data` is nested deeper than `MAX_DEPTH`."""
    return data.count(b"[") + data.count(b"{") > MAX_DEPTH and nesting(data) > MAX_DEPTH


def _as_bytes(array: "pyarrow.Array") -> "pyarrow.Array":
    import pyarrow

    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    kind = _bytes_type(array.type)
    return array if kind == array.type else array.view(kind)


def _bytes_type(kind: Any) -> Any:
    """`kind` with bytes in the place of texts."""
    import pyarrow as pa

    types = pa.types
    if types.is_string(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_string_view(kind):
        return pa.binary_view()
    if types.is_struct(kind):
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    if types.is_map(kind):
        return pa.map_(_bytes_type(kind.key_type), _bytes_type(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_bytes_field(kind), kind.list_size)
    if types.is_list(kind):
        return pa.list_(_bytes_field(kind))
    if types.is_large_list(kind):
        return pa.large_list(_bytes_field(kind))
    return kind


def _bytes_field(kind: Any) -> Any:
    return kind.value_field.with_type(_bytes_type(kind.value_type))


def _children(kind: Any) -> Iterable[Any]:
    return [kind.field(number).type for number in range(kind.num_fields)]
