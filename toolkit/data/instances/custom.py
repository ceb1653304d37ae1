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

import importlib
import inspect
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from toolkit.data.config import CustomDatasetConfig
from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.errors import ConfigError, DataError, ToolkitError

UNKNOWN_LENGTH = 1 << 62
"""Instances of a data set that does not say how many it has."""
_KINDS = {"input_ids": np.int64, "label_mask": np.bool_, "document_ids": np.int32}

WorkerType = Literal["process", "thread"]


def open_custom(
    config: CustomDatasetConfig,
    split: str,
    sequence_length: int,
    *,
    num_workers: int = 0,
    worker_type: WorkerType = "process",
) -> "MapInstances | IterableInstances | None":
    """The user's data set as instances; None for a validation split that it does not have.

    Raises:
        ConfigError: there is no such class, or it cannot be made with these arguments.
        DataError: it is neither map-style nor iterable-style.
    """
    if split != "train" and not _takes(load_class(config), "split"):
        return None
    made = make(config, split, sequence_length)
    name = config.target
    has_length = hasattr(made, "__len__")
    if has_length and len(made) == 0 and split != "train":
        return None
    if hasattr(made, "__getitem__") and has_length:
        return MapInstances(
            made, config, split, sequence_length, num_workers=num_workers, worker_type=worker_type
        )
    if hasattr(made, "__iter__"):
        if num_workers:
            raise ConfigError(
                f"data_loader.num_workers {num_workers}: {name} is iterable-style, which one "
                "reader reads in order; set it to 0, or give the class __len__ and __getitem__"
            )
        if split != "train" and not has_length:
            return None
        return IterableInstances(made, config, split, sequence_length)
    raise DataError(
        f"dataset.custom.target {name}: has neither __len__ and __getitem__ (map-style) nor "
        "__iter__ (iterable-style)"
    )


def load_class(config: CustomDatasetConfig) -> Callable[..., Any]:
    """Import `config.target`; the current folder is looked in too.

    Raises:
        ConfigError: there is no such module or name.
    """
    module_name, _, name = config.target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"dataset.custom.target: write it as module:Class, not {config.target!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"dataset.custom.target {config.target}: {error}") from None


def make(config: CustomDatasetConfig, split: str, sequence_length: int) -> Any:
    """One object of the user's class. Raises ConfigError when its arguments do not fit."""
    factory = load_class(config)
    offered = {"split": split, "sequence_length": sequence_length}
    extra = {key: value for key, value in offered.items() if _takes(factory, key)}
    try:
        return factory(**config.args, **extra)
    except ToolkitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"dataset.custom: {config.target} cannot be made: {type(error).__name__}: {error}; "
            "check dataset.custom.args"
        ) from error


class _CustomInstances:
    """What both kinds have in common."""

    bytes_per_token = 0.0
    vocab_size: int | None
    """Every id is below this, where the class says so."""

    def __init__(
        self, made: Any, config: CustomDatasetConfig, split: str, sequence_length: int
    ) -> None:
        self._made = made
        self._name = config.target
        self.sequence_length = sequence_length
        self.num_instances = len(made) if hasattr(made, "__len__") else UNKNOWN_LENGTH
        self.vocab_size = getattr(made, "vocab_size", None)
        folder = getattr(made, "tokenizer_folder", None)
        self.tokenizer_folder = Path(folder) if folder is not None else None
        self.fingerprint = self._fingerprint(config, split)

    def documents(self, index: int) -> list[DocumentPart]:
        """An item counts as one document."""
        return [DocumentPart(index, 0, self.sequence_length, self.sequence_length)]

    def _fingerprint(self, config: CustomDatasetConfig, split: str) -> str:
        import xxhash

        own = getattr(self._made, "fingerprint", None)
        if callable(own):
            own = own()
        identity = (config.target, split, self.num_instances, self.sequence_length, own)
        content = repr(identity).encode() + msgspec.json.encode(config.args, order="sorted")
        return xxhash.xxh3_64_hexdigest(content)

    def _rows(self, items: Sequence[Any], numbers: Sequence[int]) -> Rows:
        try:
            return stack_items(items, self.sequence_length, self.vocab_size)
        except ValueError as error:
            index = int(numbers[error.args[1]])
            raise DataError(f"{self._name}: item {index}: {error.args[0]}") from None


class MapInstances(_CustomInstances):
    """A map-style data set; instance i is item i."""

    def __init__(
        self,
        made: Any,
        config: CustomDatasetConfig,
        split: str,
        sequence_length: int,
        *,
        num_workers: int,
        worker_type: WorkerType,
    ) -> None:
        super().__init__(made, config, split, sequence_length)
        self._num_workers = num_workers
        self._worker_type = worker_type
        self._setup = (config, split, sequence_length)
        self._pool: Executor | None = None

    def read(self, indices: np.ndarray) -> Rows:
        """See `InstanceDataset`. Raises DataError for an item that cannot be made or used."""
        numbers = [int(index) for index in indices]
        if self._num_workers:
            items = self._read_with_workers(numbers)
        else:
            items = _items(self._made, numbers, self._name)
        return self._rows(items, numbers)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _read_with_workers(self, numbers: list[int]) -> list[Any]:
        if self._pool is None:
            self._pool = self._open_pool()
        size = -(-len(numbers) // self._num_workers)
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        try:
            if self._worker_type == "process":
                found = list(self._pool.map(_worker_items, parts))
            else:
                found = list(self._pool.map(lambda p: _items(self._made, p, self._name), parts))
        except BrokenProcessPool:
            raise DataError(
                f"{self._name}: a worker process ended suddenly (often for lack of memory); try "
                "data_loader.worker_type=thread or fewer data_loader.num_workers"
            ) from None
        return list(itertools.chain.from_iterable(found))

    def _open_pool(self) -> Executor:
        if self._worker_type == "thread":
            return ThreadPoolExecutor(self._num_workers, thread_name_prefix="data-worker")
        # Not forked: this process has threads and perhaps a device, which a fork would copy broken.
        return ProcessPoolExecutor(
            self._num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open_worker,
            initargs=(msgspec.json.encode(self._setup[0]), *self._setup[1:]),
        )


class IterableInstances(_CustomInstances):
    """An iterable-style data set; instance i is the i-th item, passes following each other.

    Reading on is cheap; going back, or far ahead, iterates from the start unless the class has
    `iterate`.
    """

    def __init__(
        self, made: Any, config: CustomDatasetConfig, split: str, sequence_length: int
    ) -> None:
        super().__init__(made, config, split, sequence_length)
        self._items: Iterator[Any] | None = None
        self._next = 0

    def read(self, indices: np.ndarray) -> Rows:
        """See `InstanceDataset`; `indices` ascend."""
        items = []
        for index in indices.tolist():
            if self._items is None or index < self._next:
                self._items, self._next = self._open(index)
            for _ in range(index - self._next):
                next(self._items)
            items.append(next(self._items))
            self._next = index + 1
        return self._rows(items, indices.tolist())

    def close(self) -> None:
        """Nothing is held open."""

    def _open(self, start: int) -> tuple[Iterator[Any], int]:
        if hasattr(self._made, "iterate"):
            return iter(self._made.iterate(start)), start
        return self._passes(), 0

    def _passes(self) -> Iterator[Any]:
        while True:
            count = 0
            for item in self._made:
                count += 1
                yield item
            if count == 0:
                raise DataError(f"{self._name}: gave no items")


class SequentialStream:
    """Position p is instance p: the order of an iterable-style data set is its own."""

    keeps_epochs_apart = False
    end = None

    def __init__(self, epoch_instances: int) -> None:
        self.epoch_instances = epoch_instances

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """See `toolkit.data.order.stream.InstanceStream`."""
        return positions


def stack_items(items: Sequence[Any], sequence_length: int, vocab_size: int | None) -> Rows:
    """Items as rows of one length.

    Raises:
        ValueError: (reason, number of the item) for one that is not as it should be.
    """
    # A mask always: ranks whose items happen to have none must agree with those whose have.
    wanted = {"label_mask", *(key for item in items if isinstance(item, dict) for key in item)}
    found: list[dict[str, np.ndarray]] = []
    for number, item in enumerate(items):
        arrays = item if isinstance(item, dict) else {"input_ids": item}
        if unknown := sorted(arrays.keys() - _KINDS.keys()):
            raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(_KINDS)}", number)
        if "input_ids" not in arrays:
            raise ValueError("has no input_ids", number)
        arrays = {key: np.asarray(value) for key, value in arrays.items()}
        shape = arrays["input_ids"].shape
        if len(shape) != 1 or not 1 <= shape[0] <= sequence_length:
            raise ValueError(
                f"input_ids has shape {shape}; give 1 to {sequence_length} "
                "(dataset.sequence_length) ids",
                number,
            )
        for key, value in arrays.items():
            if value.shape != shape:
                raise ValueError(f"{key} has shape {value.shape}, input_ids {shape}", number)
        ids = arrays["input_ids"]
        if ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids holds {ids.dtype}, not integers", number)
        if int(ids.min()) < 0 or (vocab_size is not None and int(ids.max()) >= vocab_size):
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()}, the vocabulary has {vocab_size}", number
            )
        found.append(arrays)
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


def _items(made: Any, numbers: Sequence[int], name: str) -> list[Any]:
    items = []
    for number in numbers:
        try:
            items.append(made[number])
        except ToolkitError:
            raise
        except Exception as error:
            raise DataError(
                f"{name}: item {number} cannot be made: {type(error).__name__}: {error}"
            ) from error
    return items


_worker_dataset: Any = None


def _open_worker(config: bytes, split: str, sequence_length: int) -> None:
    global _worker_dataset
    decoded = msgspec.json.decode(config, type=CustomDatasetConfig)
    _worker_dataset = (make(decoded, split, sequence_length), decoded.target)


def _worker_items(numbers: Sequence[int]) -> list[Any]:
    made, name = _worker_dataset
    return _items(made, numbers, name)


def _takes(factory: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(factory).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds
