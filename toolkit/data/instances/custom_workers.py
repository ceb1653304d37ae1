"""Workers that make the items of a map-style data set written in Python."""

import contextlib
import functools
import inspect
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

import msgspec

from toolkit import signals
from toolkit.config.named import users_class
from toolkit.data.config import CustomDatasetConfig
from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.parents import end_with_parent
from toolkit.threads import ThreadPool

WorkerType = Literal["process", "thread"]


class ItemReader:
    """Items by number, made here or by workers, which start with the first read. `made` is the
    user's object, `setup` what it was made of: worker processes make their own."""

    def __init__(
        self,
        made: Any,
        setup: tuple[CustomDatasetConfig, str, int],
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
        with user_code(f"{name}: item {number} cannot be made"):
            items.append(made[number])
    return items


_worker_dataset: Any = None


def _open_worker(parent: int, config: bytes, split: str, sequence_length: int) -> None:
    global _worker_dataset
    signals.ignore_in_worker()
    end_with_parent(parent)
    decoded = msgspec.json.decode(config, type=CustomDatasetConfig)
    _worker_dataset = (make(decoded, split, sequence_length), decoded.target)


def _worker_items(numbers: Sequence[int]) -> list[Any]:
    made, name = _worker_dataset
    return _items(made, numbers, name)


def load_class(config: CustomDatasetConfig) -> Any:
    """The class `config.target`. Raises ConfigError: there is none."""
    return users_class(config.target, key="dataset.custom.target")


def make(config: CustomDatasetConfig, split: str, sequence_length: int) -> Any:
    """The object of the user's class for these arguments; asked for again, the same one: it may
    hold all of its data. ConfigError: its arguments do not fit."""
    # The class itself is in the key: a module that is reloaded has another one.
    return _make(load_class(config), msgspec.json.encode(config), split, sequence_length)


# A run reads two splits of one data set.
@functools.lru_cache(maxsize=2)
def _make(factory: Callable[..., Any], encoded: bytes, split: str, sequence_length: int) -> Any:
    config = msgspec.json.decode(encoded, type=CustomDatasetConfig)
    offered = {"split": split, "sequence_length": sequence_length}
    extra = {key: value for key, value in offered.items() if takes(factory, key)}
    try:
        return factory(**config.args, **extra)
    except ToolkitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"dataset.custom: {config.target} cannot be made: {type(error).__name__}: {error}; "
            "check dataset.custom.args"
        ) from error


def takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether `factory` has an argument of this name."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C, and does not say
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Raises DataError, which begins with `what`, in place of any error of the user's code."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error
