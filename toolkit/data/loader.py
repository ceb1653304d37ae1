"""Loaders: batch n of training for one rank, and the validation instances.

`TrainLoader` reads several batches at once ("a chunk"): their order is computed together, their
rows are gathered with one indexing operation, and handed over with one queue operation. A batch
then costs a few microseconds however small it is, and the background thread that reads ahead seldom
needs the interpreter.
"""

import atexit
import contextlib
import functools
import logging
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from toolkit.data.config import DataConfig
from toolkit.data.instances.fixed import BatchOrder, TokenDataset
from toolkit.data.tokens.prepare import ensure_prepared
from toolkit.data.tokens.tokenizer import load_tokenizer
from toolkit.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 1 << 16
"""Tokens of one rank read at once: small batches are read many at a time."""
LEAVING_SECONDS = 5.0
"""Longest wait for the reading thread (a network file system may hang)."""

Batch = dict[str, torch.Tensor]
T = TypeVar("T")


def get_dataloaders(
    cfg: DataConfig,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    eval_batch_tokens: int | None = None,
    check_text: bool = True,
) -> "tuple[TrainLoader, EvalLoader | None]":
    """Loaders of the corpus in `cfg`, which is prepared now if it does not exist yet.

    Args:
        rank, world_size: this process among the data-parallel ones; default: torch.distributed's
            if it is initialised, else 0 of 1.
        eval_batch_tokens: tokens per evaluation forward when `data_loader.eval_batch_size` is null;
            default: a rank's share of the global batch.
        check_text: see `ensure_prepared`.

    Raises:
        ConfigError: sizes that do not divide.
        DataError: the corpus cannot be prepared, opened, or is too small.
    """
    if rank is None or world_size is None:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if is_distributed else 0
        world_size = torch.distributed.get_world_size() if is_distributed else 1
    loader, sequence_length = cfg.data_loader, cfg.dataset.sequence_length
    prepared = ensure_prepared(cfg.dataset, check_text=check_text)
    train = TrainLoader(
        TokenDataset(prepared, "train", sequence_length),
        global_batch_size=loader.global_batch_size,
        seed=cfg.seed if loader.seed is None else loader.seed,
        rank=rank,
        world_size=world_size,
        shuffle=loader.shuffle,
        prefetch_factor=loader.prefetch_factor,
        vocab_size=prepared.vocab_size,
    )
    if not prepared.has_split("val"):
        return train, None
    val = TokenDataset(prepared, "val", sequence_length)
    if val.num_instances == 0:
        logger.warning(
            "no evaluation: the validation split of %s has %d tokens, less than one instance of "
            "dataset.sequence_length %d",
            prepared.folder,
            prepared.num_tokens("val"),
            sequence_length,
        )
        return train, None
    batch_tokens = loader.eval_batch_size or eval_batch_tokens
    return train, EvalLoader(
        val,
        eval_tokens=loader.eval_tokens,
        batch_tokens=batch_tokens or loader.global_batch_size // world_size,
        rank=rank,
        world_size=world_size,
    )


class TrainLoader:
    """Endless training batches whose order depends on (fingerprint, seed, epoch) alone.

    Rank r gets the r-th contiguous slice of each global batch.

    Attributes:
        global_batch_size: tokens per optimizer step over all ranks.
        sequence_length: tokens per instance.
        num_instances: instances of the training split.
        steps_per_epoch: whole global batches in it.
        dropped_instances: instances that one epoch leaves out.
        batches_done: number of the next batch; `iterate` sets it as it yields.
        fingerprint, vocab_size, bytes_per_token: of the training split.
        tokenizer_folder: of the tokenizer that made the tokens.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        prefetch_factor: int,
        vocab_size: int,
    ) -> None:
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.sequence_length = dataset.sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = dataset.fingerprint
        self.bytes_per_token = dataset.bytes_per_token
        self.tokenizer_folder = dataset.tokenizer_folder
        self.vocab_size = vocab_size
        self.num_instances = dataset.num_instances
        self.batches_done = 0
        self._prefetch_factor = prefetch_factor
        instances = _instances_per_batch(global_batch_size, dataset.sequence_length, world_size)
        if dataset.num_instances < instances:
            raise DataError(
                f"not enough data for one batch: the training split has {self.num_instances} "
                f"instances of dataset.sequence_length {self.sequence_length}, one batch of "
                f"data_loader.global_batch_size {global_batch_size} needs {instances}; make "
                "one of the two smaller, or give more text"
            )
        self._order = BatchOrder(
            num_instances=self.num_instances,
            batch_instances=instances,
            fingerprint=self.fingerprint,
            seed=seed,
            shuffle=shuffle,
        )
        self.steps_per_epoch = self._order.steps_per_epoch
        self.dropped_instances = self.num_instances - self.steps_per_epoch * instances
        self._rows = instances // world_size
        self._slice = slice(rank * self._rows, (rank + 1) * self._rows)

    def instance_indices(self, batch_number: int) -> np.ndarray:
        """Instances of the global batch, shape `(global_batch_size / sequence_length,)`."""
        return self._order.indices(batch_number)[0]

    def global_batch(self, batch_number: int) -> Batch:
        """The global batch itself: `{"input_ids": int64 (batch, seq)}`, all ranks' rows."""
        rows = self.dataset.read(self.instance_indices(batch_number))
        return {"input_ids": torch.from_numpy(rows)}

    def iterate(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """This rank's rows of batch `start_batch` and all that follow, over epochs without end.

        Yields `{"input_ids": int64 (rows, seq)}`.
        """
        chunk_batches = max(1, CHUNK_TOKENS // (self._rows * self.sequence_length))
        chunks = self._chunks(start_batch, chunk_batches)
        if self._prefetch_factor:
            chunks = _read_ahead(chunks, -(-self._prefetch_factor // chunk_batches))
        self.batches_done = start_batch
        with contextlib.closing(chunks):
            for chunk in chunks:
                for rows in torch.from_numpy(chunk).split(self._rows):
                    self.batches_done += 1
                    yield {"input_ids": rows}

    def state_dict(self) -> dict[str, Any]:
        """The position and what gives it meaning; a few numbers."""
        return {"batch": self.batches_done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set `batches_done`; continue with `iterate(loader.batches_done)`.

        Raises:
            DataError: when the state belongs to other data or another order.
        """
        keys = {
            "fingerprint": "the training data",
            "seed": "data_loader.seed",
            "shuffle": "data_loader.shuffle",
            "global_batch_size": "data_loader.global_batch_size",
            "sequence_length": "dataset.sequence_length",
        }
        changed = [
            f"{keys[key]} (was {state.get(key)}, is {value})"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if changed:
            raise DataError(
                f"cannot continue with the next unseen batch: changed since the checkpoint: "
                f"{', '.join(changed)}; set it back, or go on anyway with a fresh data order by "
                "starting a new run with trainer.load_path and trainer.load_weights_only=true"
            )
        self.batches_done = state["batch"]

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "global_batch_size": self.global_batch_size,
            "sequence_length": self.sequence_length,
        }

    def _chunks(self, batch: int, count: int) -> Generator[np.ndarray, None, None]:
        while True:
            indices = self._order.indices(batch, count)[:, self._slice]
            yield self.dataset.read(indices.reshape(-1))
            batch += count


class EvalLoader:
    """The first validation instances in file order, each one on exactly one rank.

    Every rank gets the same number of batches of the same shape. Rows that fill up the last ones
    are masked.

    Attributes:
        num_instances: instances evaluated over all ranks.
        sequence_length: tokens per instance.
        num_batches: batches of each rank.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        eval_tokens: int | None,
        batch_tokens: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.dataset = dataset
        self.sequence_length = dataset.sequence_length
        wanted = dataset.num_instances
        if eval_tokens is not None:
            wanted = min(wanted, max(1, eval_tokens // self.sequence_length))
        self.num_instances = wanted
        share = -(-wanted // world_size)
        self._rows = min(max(1, batch_tokens // self.sequence_length), share)
        self.num_batches = -(-wanted // (self._rows * world_size))
        self._rank, self._world_size = rank, world_size

    @functools.cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of the instances evaluated; they are decoded to count."""
        if self.num_instances == self.dataset.num_instances:
            return self.dataset.bytes_per_token
        tokenizer = load_tokenizer(self.dataset.tokenizer_folder)
        ids = self.dataset.instances[: self.num_instances].reshape(-1)
        text = tokenizer.decode(ids[ids != tokenizer.eos_id].tolist())
        return len(text.encode()) / ids.size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield `{"input_ids": int64 (rows, seq), "label_mask": bool (rows, seq)}`."""
        for number in range(self.num_batches):
            first = (number * self._world_size + self._rank) * self._rows
            indices = np.arange(first, first + self._rows)
            is_real = torch.from_numpy(indices < self.num_instances)
            rows = self.dataset.read(np.minimum(indices, self.num_instances - 1))
            yield {
                "input_ids": torch.from_numpy(rows),
                "label_mask": is_real[:, None].expand(-1, self.sequence_length).contiguous(),
            }


def _instances_per_batch(global_batch_size: int, sequence_length: int, world_size: int) -> int:
    unit = sequence_length * world_size
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit} or {2 * unit}"
        raise ConfigError(
            f"data_loader.global_batch_size {global_batch_size} is not divisible by "
            f"dataset.sequence_length {sequence_length} x {world_size} data-parallel ranks = "
            f"{unit}; the nearest sizes that work are {nearest}"
        )
    return global_batch_size // sequence_length


class _Failure(NamedTuple):
    error: BaseException


def _read_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """`items`, of which a background thread keeps `depth` ready.

    An error of the thread is raised where the item would have been. The thread ends when this
    iterator is closed or collected, and with the process. It must not be inside C++ code when the
    interpreter ends (the process would abort), so `items` may not call torch, and leaving waits
    for the item being read.
    """
    # SimpleQueue is written in C: a hand-over costs about a microsecond when nobody waits.
    ready: queue.SimpleQueue[T | _Failure] = queue.SimpleQueue()
    wanted: queue.SimpleQueue[None] = queue.SimpleQueue()
    closed = threading.Event()

    def read() -> None:
        try:
            wanted.get()
            while not closed.is_set():
                ready.put(next(items))
                wanted.get()
        except BaseException as error:
            ready.put(_Failure(error))

    thread = threading.Thread(target=read, name="data-reader", daemon=True)

    def stop() -> None:
        closed.set()
        wanted.put(None)
        if thread is not threading.current_thread():
            thread.join(LEAVING_SECONDS)

    for _ in range(depth):
        wanted.put(None)
    thread.start()
    atexit.register(stop)
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Failure):
                raise item.error
            wanted.put(None)
            yield item
    finally:
        # Collected after `stop` ran at exit, module globals are gone already.
        if not closed.is_set():
            atexit.unregister(stop)
            stop()
