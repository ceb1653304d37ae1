"""Data sets written in Python: what a user's class gives, as instances.

A class is one of two kinds (docs/data.md has an example of each):

    map-style       __len__() and __getitem__(number) -> item
    iterable-style  __iter__() -> items of one pass, always in the same order; optionally
                    iterate(start) -> endless items from number `start` on, counted over all passes

An item is an array of ids, or a dictionary of arrays of one length: `input_ids`, and if wanted
`label_mask` and `document_ids` (see `toolkit.data.instances.base`). Shorter ones are padded.
Optional attributes: `vocab_size`, `fingerprint` (text that identifies the content), and
`tokenizer_folder`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from toolkit.data.config import CustomDatasetConfig
from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.instances.custom_workers import (
    ItemReader,
    WorkerType,
    load_class,
    make,
    takes,
    user_code,
)
from toolkit.errors import ConfigError, DataError

UNKNOWN_LENGTH = 1 << 62
"""Instances of a data set that does not say how many it has."""
_ENDED = object()


def open_custom(
    config: CustomDatasetConfig,
    split: str,
    sequence_length: int,
    *,
    num_workers: int = 0,
    worker_type: WorkerType = "process",
) -> "CustomInstances | None":
    """The user's data set as instances; None for a validation split that it does not have.
    ConfigError or DataError: there is no such class, it cannot be made, or is of neither kind."""
    if split != "train" and not takes(load_class(config), "split"):
        return None
    made, name = make(config, split, sequence_length), config.target
    has_length = hasattr(made, "__len__")
    if split != "train" and has_length and _length(made, name) == 0:
        return None
    reader: ItemReader | SequentialReader
    if hasattr(made, "__getitem__") and has_length:
        setup = (config, split, sequence_length)
        reader = ItemReader(made, setup, num_workers=num_workers, worker_type=worker_type)
    elif hasattr(made, "__iter__"):
        if num_workers:
            raise ConfigError(
                f"data_loader.num_workers {num_workers}: {name} is iterable-style, which one "
                "reader reads in order; set it to 0, or give the class __len__ and __getitem__"
            )
        if split != "train" and not has_length:
            return None
        reader = SequentialReader(made, name)
    else:
        raise DataError(
            f"dataset.custom.target {name}: has neither __len__ and __getitem__ (map-style) nor "
            "__iter__ (iterable-style)"
        )
    return CustomInstances(made, config, split, sequence_length, reader)


class CustomInstances:
    """The user's data set as an `InstanceDataset`; instance i is item i, of an iterable-style one
    the i-th, passes following each other.

    Attributes:
        vocab_size: every id is below this, where the class says so.
        is_sequential: whether it is iterable-style.
        is_slow_to_read: rows come from the user's code, so nothing is read that was not asked for.
    """

    bytes_per_token = 0.0
    is_slow_to_read = True

    def __init__(
        self,
        made: Any,
        config: CustomDatasetConfig,
        split: str,
        sequence_length: int,
        reader: "ItemReader | SequentialReader",
    ) -> None:
        self._reader, self._name = reader, config.target
        self.sequence_length = sequence_length
        self.is_sequential = isinstance(reader, SequentialReader)
        has_length = hasattr(made, "__len__")
        self.num_instances = _length(made, self._name) if has_length else UNKNOWN_LENGTH
        with user_code(f"{self._name}: vocab_size or tokenizer_folder cannot be had"):
            self.vocab_size: int | None = getattr(made, "vocab_size", None)
            folder = getattr(made, "tokenizer_folder", None)
        self.tokenizer_folder = Path(folder) if folder is not None else None
        with user_code(f"{self._name}: its fingerprint cannot be had"):
            own = getattr(made, "fingerprint", None)
            own = own() if callable(own) else own
        identity = (config.target, split, self.num_instances, sequence_length, own)
        content = repr(identity).encode() + msgspec.json.encode(config.args, order="sorted")
        self.fingerprint = xxhash.xxh3_64_hexdigest(content)

    def read(self, indices: np.ndarray) -> Rows:
        """Raises DataError for an item that cannot be made or used."""
        numbers = indices.tolist()
        named = [f"{self._name}: item {number}" for number in numbers]
        items = self._reader.read(numbers)
        return stack_items(items, named, self.sequence_length, self.vocab_size)

    def documents(self, index: int) -> list[DocumentPart]:
        """An item counts as one document."""
        return [DocumentPart(index, 0, self.sequence_length, self.sequence_length)]

    def close(self) -> None:
        """End the workers."""
        self._reader.close()


class SequentialReader:
    """Items of an iterable-style data set. Reading on is cheap; going back, or far ahead, iterates
    from the start unless the class has `iterate`."""

    def __init__(self, made: Any, name: str) -> None:
        self._made, self._name = made, name
        self._items: Iterator[Any] | None = None
        self._next = 0

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """The items `numbers`, which ascend. Raises DataError for one that cannot be made."""
        try:
            return [self._item(number) for number in numbers]
        except BaseException:
            # A generator that raised has ended.
            self._items = None
            raise

    def close(self) -> None:
        """Nothing is held open."""

    def _item(self, number: int) -> Any:
        if self._items is None or number < self._next:
            with user_code(f"{self._name}: iterating from item {number} on fails"):
                can_skip = hasattr(self._made, "iterate")
                self._items = iter(self._made.iterate(number)) if can_skip else self._passes()
                self._next = number if can_skip else 0
        while True:
            with user_code(f"{self._name}: item {self._next} cannot be made"):
                item = next(self._items, _ENDED)
            if item is _ENDED:
                raise DataError(
                    f"{self._name}: iterate() ends before item {self._next}; it must go on without "
                    "end, pass after pass"
                )
            self._next += 1
            if self._next > number:
                return item

    def _passes(self) -> Iterator[Any]:
        while True:
            item = _ENDED
            for item in self._made:
                yield item
            if item is _ENDED:
                raise DataError(f"{self._name}: gave no items")


class SequentialStream:
    """An `InstanceStream` whose position p is instance p: the order of an iterable-style data set
    is its own."""

    keeps_epochs_apart = False
    end = None

    def __init__(self, epoch_instances: int) -> None:
        self.epoch_instances = epoch_instances

    def indices(self, positions: np.ndarray) -> np.ndarray:
        return positions


def _length(made: Any, name: str) -> int:
    with user_code(f"{name}: len() of it fails"):
        return len(made)


_KINDS = {"input_ids": np.int64, "label_mask": np.bool_, "document_ids": np.int32}
_NUMBERS = {"input_ids": "iu", "label_mask": "biuf", "document_ids": "iu"}


def stack_items(
    items: Sequence[Any], named: Sequence[str], sequence_length: int, vocab_size: int | None
) -> Rows:
    """Items, called `named` in messages, as rows of one length. DataError: one is no such item."""
    found = [
        _arrays(item, name, sequence_length, vocab_size)
        for item, name in zip(items, named, strict=True)
    ]
    # A mask always: ranks whose items happen to have none must agree with those whose have.
    wanted = {"label_mask", *(key for arrays in found for key in arrays)}
    if any(len(arrays["input_ids"]) < sequence_length for arrays in found):
        wanted.add("document_ids")
    rows: Rows = {}
    for key in ("input_ids", *sorted(wanted - {"input_ids"})):
        rows[key] = np.zeros((len(found), sequence_length), dtype=_KINDS[key])
        for row, arrays in zip(rows[key], found, strict=True):
            length = len(arrays["input_ids"])
            row[:length] = arrays.get(key, key == "label_mask")
            if key == "document_ids" and length < sequence_length:
                row[length:] = row[length - 1] + 1
    return rows


def _arrays(
    item: Any, name: str, sequence_length: int, vocab_size: int | None
) -> dict[str, np.ndarray]:
    given = item if isinstance(item, dict) else {"input_ids": item}
    if unknown := sorted(map(str, given.keys() - _KINDS.keys())):
        raise DataError(f"{name}: unknown key {unknown[0]!r}; known are {', '.join(_KINDS)}")
    if "input_ids" not in given:
        raise DataError(f"{name}: has no input_ids")
    arrays = {}
    for key, value in given.items():
        try:
            arrays[key] = np.asarray(value)
        except Exception as error:  # a row with holes in it, a tensor on a device, anything
            raise DataError(f"{name}: {key} is no array of numbers: {error}") from error
    ids = arrays["input_ids"]
    if ids.ndim != 1 or not 1 <= len(ids) <= sequence_length:
        raise DataError(
            f"{name}: input_ids has shape {ids.shape}; give 1 to {sequence_length} "
            "(dataset.sequence_length) ids"
        )
    for key, value in arrays.items():
        if value.shape != ids.shape:
            raise DataError(f"{name}: {key} has shape {value.shape}, input_ids {ids.shape}")
        if value.dtype.kind not in _NUMBERS[key]:
            kind = "truth values" if key == "label_mask" else "integers"
            raise DataError(f"{name}: {key} holds {value.dtype}, not {kind}")
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= (vocab_size or 1 << 63):
        limit = "unknown size" if vocab_size is None else vocab_size
        raise DataError(f"{name}: ids from {lowest} to {highest}, the vocabulary has {limit}")
    return arrays
