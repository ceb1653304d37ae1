"""Items of a data set written in Python, as rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.data.instances.base import Rows

_KINDS = {"input_ids": np.int64, "label_mask": np.bool_, "document_ids": np.int32}
_NUMBERS = {"input_ids": "iu", "label_mask": "biuf", "document_ids": "iu"}


class ItemError(Exception):
    """An item is not as it should be.

    Attributes:
        place: the number of the item among those given.
    """

    def __init__(self, reason: str, place: int) -> None:
        super().__init__(reason)
        self.place = place


def stack_items(items: Sequence[Any], sequence_length: int, vocab_size: int | None) -> Rows:
    """Items as rows of one length.

    Raises:
        ItemError: one is not as it should be.
    """
    # A mask always: ranks whose items happen to have none must agree with those whose have.
    wanted = {"label_mask", *(key for item in items if isinstance(item, dict) for key in item)}
    found = [
        _arrays(item, place, sequence_length, vocab_size) for place, item in enumerate(items)
    ]  # fmt: skip
    is_padded = any(len(arrays["input_ids"]) < sequence_length for arrays in found)
    if is_padded:
        wanted.add("document_ids")
    rows: Rows = {}
    for key in ("input_ids", *sorted(wanted - {"input_ids"})):
        rows[key] = np.zeros((len(found), sequence_length), dtype=_KINDS[key])
        for row, arrays in zip(rows[key], found, strict=True):
            length = len(arrays["input_ids"])
            default = key == "label_mask"
            row[:length] = arrays.get(key, default)
            if key == "document_ids" and length < sequence_length:
                row[length:] = row[length - 1] + 1
    return rows


def _arrays(
    item: Any, place: int, sequence_length: int, vocab_size: int | None
) -> dict[str, np.ndarray]:
    given = item if isinstance(item, dict) else {"input_ids": item}
    if unknown := sorted(map(str, given.keys() - _KINDS.keys())):
        raise ItemError(f"unknown key {unknown[0]!r}; known are {', '.join(_KINDS)}", place)
    if "input_ids" not in given:
        raise ItemError("has no input_ids", place)
    arrays = {key: _array(key, value, place) for key, value in given.items()}
    ids = arrays["input_ids"]
    if ids.ndim != 1 or not 1 <= len(ids) <= sequence_length:
        raise ItemError(
            f"input_ids has shape {ids.shape}; give 1 to {sequence_length} "
            "(dataset.sequence_length) ids",
            place,
        )
    for key, value in arrays.items():
        if value.shape != ids.shape:
            raise ItemError(f"{key} has shape {value.shape}, input_ids {ids.shape}", place)
        if value.dtype.kind not in _NUMBERS[key]:
            kind = "truth values" if key == "label_mask" else "integers"
            raise ItemError(f"{key} holds {value.dtype}, not {kind}", place)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= (vocab_size or 1 << 63):
        limit = "unknown size" if vocab_size is None else vocab_size
        raise ItemError(f"ids from {lowest} to {highest}, the vocabulary has {limit}", place)
    return arrays


def _array(key: str, value: Any, place: int) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # a row with holes in it, a tensor on a device, anything
        raise ItemError(f"{key} is no array of numbers: {error}", place) from error
