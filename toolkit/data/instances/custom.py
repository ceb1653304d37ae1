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

import contextlib
import functools
import inspect
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash

from toolkit import signals
from toolkit.config.named import users_class
from toolkit.data.config import CustomDatasetConfig
from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.parents import end_with_parent
from toolkit.threads import ThreadPool

WorkerType = Literal["process", "thread"]
Setup = tuple[CustomDatasetConfig, str, int]
"""What an object of the user's class is made of: its config, the split and `sequence_length`."""

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
    if split != "train" and not _takes(_load_class(config), "split"):
        return None
    setup, name = (config, split, sequence_length), config.target
    made = _make(*setup)
    length = UNKNOWN_LENGTH
    if hasattr(made, "__len__"):
        with _user_code(f"{name}: len() of it fails"):
            length = len(made)
    is_map_style = hasattr(made, "__getitem__") and length != UNKNOWN_LENGTH
    if not is_map_style and not hasattr(made, "__iter__"):
        raise DataError(
            f"dataset.custom.target {name}: has neither __len__ and __getitem__ (map-style) nor "
            "__iter__ (iterable-style)"
        )
    if not is_map_style and num_workers:
        raise ConfigError(
            f"data_loader.num_workers {num_workers}: {name} is iterable-style, which one reader "
            "reads in order; set it to 0, or give the class __len__ and __getitem__"
        )
    if split != "train" and length in (0, UNKNOWN_LENGTH):
        return None
    reader: ItemReader | SequentialReader = SequentialReader(made, name)
    if is_map_style:
        reader = ItemReader(made, setup, num_workers=num_workers, worker_type=worker_type)
    return CustomInstances(made, setup, length, reader)


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
        self, made: Any, setup: "Setup", length: int, reader: "ItemReader | SequentialReader"
    ) -> None:
        config, split, self.sequence_length = setup
        self._reader, self._name = reader, config.target
        self.is_sequential = isinstance(reader, SequentialReader)
        self.num_instances = length
        with _user_code(
            f"{self._name}: its vocab_size, tokenizer_folder or fingerprint cannot be had"
        ):
            self.vocab_size: int | None = getattr(made, "vocab_size", None)
            folder = getattr(made, "tokenizer_folder", None)
            own = getattr(made, "fingerprint", None)
            own = own() if callable(own) else own
        self.tokenizer_folder = Path(folder) if folder is not None else None
        identity = (self._name, split, length, self.sequence_length, own)
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


class ItemReader:
    """Items by number, made here or by workers, which start with the first read. `made` is the
    user's object, `setup` what it was made of: worker processes make their own."""

    def __init__(
        self,
        made: Any,
        setup: Setup,
        *,
        num_workers: int,
        worker_type: WorkerType,
    ) -> None:
        self._made, self._setup, self._name = made, setup, setup[0].target
        self._num_workers, self._worker_type = num_workers, worker_type
        self._pool: Executor | None = None
        self._processes: Any = {}

    def read(self, numbers: Sequence[int]) -> list[Any]:
        """The items in the order of `numbers`. Raises DataError for one that cannot be made."""
        if not self._num_workers:
            return _items(self._made, numbers, self._name)
        if self._pool is None:
            self._pool = self._open_pool()
        size = -(-len(numbers) // self._num_workers)
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        try:
            if self._worker_type == "process":
                with signals.starting_workers():
                    found = self._pool.map(_worker_items, parts)
            else:
                found = self._pool.map(lambda p: _items(self._made, p, self._name), parts)
            return list(itertools.chain.from_iterable(found))
        except BrokenProcessPool:
            for process in list(self._processes.values()):
                process.kill()  # they do not end by the SIGTERM that the broken pool sends
            self.close()
            if signals.asked() is not None:
                # Whoever asked this process to stop may have ended its workers. The batch is still
                # wanted, since other ranks train on theirs.
                self._num_workers = 0
                return _items(self._made, numbers, self._name)
            raise DataError(
                f"{self._name}: a worker process ended suddenly (often for lack of memory); try "
                "data_loader.worker_type=thread or fewer data_loader.num_workers"
            ) from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _open_pool(self) -> Executor:
        if self._worker_type == "thread":
            return ThreadPool(self._num_workers, thread_name_prefix="data-worker")
        # Not forked: this process has threads and perhaps a device, which a fork would copy broken.
        pool = ProcessPoolExecutor(
            self._num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open_worker,
            initargs=(os.getpid(), msgspec.json.encode(self._setup[0]), *self._setup[1:]),
        )
        self._processes = pool._processes  # filled as they start; the pool forgets it at its end
        return pool


def _items(made: Any, numbers: Sequence[int], name: str) -> list[Any]:
    items = []
    for number in numbers:
        with _user_code(f"{name}: item {number} cannot be made"):
            items.append(made[number])
    return items


_worker_dataset: Any = None


def _open_worker(parent: int, config: bytes, split: str, sequence_length: int) -> None:
    global _worker_dataset
    signals.ignore_in_worker()
    end_with_parent(parent)
    decoded = msgspec.json.decode(config, type=CustomDatasetConfig)
    _worker_dataset = (_make(decoded, split, sequence_length), decoded.target)


def _worker_items(numbers: Sequence[int]) -> list[Any]:
    made, name = _worker_dataset
    return _items(made, numbers, name)


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
            with _user_code(f"{self._name}: iterating from item {number} on fails"):
                can_skip = hasattr(self._made, "iterate")
                self._items = iter(self._made.iterate(number)) if can_skip else self._passes()
                self._next = number if can_skip else 0
        while True:
            with _user_code(f"{self._name}: item {self._next} cannot be made"):
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


def _load_class(config: CustomDatasetConfig) -> Any:
    """The class `config.target`. Raises ConfigError: there is none."""
    return users_class(config.target, key="dataset.custom.target")


def _make(config: CustomDatasetConfig, split: str, sequence_length: int) -> Any:
    """The object of the user's class for these arguments; asked for again, the same one: it may
    hold all of its data. ConfigError: its arguments do not fit."""
    # The class itself is in the key: a module that is reloaded has another one.
    return _make_once(_load_class(config), msgspec.json.encode(config), split, sequence_length)


# A run reads two splits of one data set.
@functools.lru_cache(maxsize=2)
def _make_once(
    factory: Callable[..., Any], encoded: bytes, split: str, sequence_length: int
) -> Any:
    config = msgspec.json.decode(encoded, type=CustomDatasetConfig)
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


def _takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether `factory` has an argument of this name."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C, and does not say
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


@contextlib.contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Raises DataError, which begins with `what`, in place of any error of the user's code."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error
