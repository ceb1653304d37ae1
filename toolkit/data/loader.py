"""Loaders: batch n of training for one rank, and the validation instances.

`TrainLoader` reads several small batches at once ("a chunk"): their order, rows and hand-over cost
one operation each, so the background thread that reads ahead seldom needs the interpreter.
"""

import contextlib
import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from toolkit.config.named import named
from toolkit.data.config import DataConfig, DataLoaderConfig
from toolkit.data.corpus import Corpus, changed_data, open_corpus
from toolkit.data.evaluation import EvalLoader
from toolkit.data.instances.base import Rows, check_ids
from toolkit.data.instances.custom import UNKNOWN_LENGTH
from toolkit.data.order.batches import BatchOrder, StreamBatches, check_batch_size
from toolkit.data.order.mixture import check_limits
from toolkit.data.order.plan import Segment, batch_that_fits
from toolkit.data.prefetch import prefetch_to_device, read_ahead
from toolkit.errors import DataError

CHUNK_TOKENS = 1 << 17
"""Tokens of one rank read at once: small batches are read many at a time."""
ORDERED_INSTANCES = 4096
"""Instances whose order is computed at once: a few numbers cost as much as many."""

Batch = dict[str, torch.Tensor]


def get_dataloaders(
    cfg: DataConfig,
    *,
    batch_rank: int | None = None,
    batch_ranks: int | None = None,
    eval_batch_tokens: int | None = None,
    vocab_size: int = 0,
    device: torch.device | None = None,
    corpus: Corpus | None = None,
) -> "tuple[TrainLoader, dict[str, EvalLoader]]":
    """Loaders of the corpus in `cfg`, which is prepared now if it does not exist yet.

    Args:
        batch_rank, batch_ranks: which share of each batch's rows this process reads, out of how
            many; default: its rank in torch.distributed if that is initialised, else 0 of 1.
        eval_batch_tokens: tokens per evaluation forward when `data_loader.eval_batch_size` is null;
            default: a rank's share of the global batch.
        vocab_size: the model's, for data that does not name its own vocabulary.
        device: where training batches are put, ahead of time; default: the CPU.
        corpus: the data of `cfg`, when it is open already.

    Returns the training loader, and a loader for each set of validation instances: `val`, or in a
    mixture one by the name of each source; and one for each of `dataset.eval_sets`.

    Raises:
        ConfigError: sizes that do not divide.
        DataError: the corpus cannot be prepared, opened, or is too small.
    """
    if batch_rank is None or batch_ranks is None:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        batch_rank = torch.distributed.get_rank() if is_distributed else 0
        batch_ranks = torch.distributed.get_world_size() if is_distributed else 1
    if corpus is None:
        corpus = open_corpus(cfg, named("toolkit.data.prepare.corpus:prepare_corpus")(cfg))
    corpus.vocab_size = corpus.vocab_size or vocab_size
    train = TrainLoader(
        corpus, cfg.data_loader, rank=batch_rank, world_size=batch_ranks, device=device
    )  # fmt: skip
    train.config = cfg
    batch_tokens = cfg.data_loader.eval_batch_size or eval_batch_tokens
    evaluation = {
        name: EvalLoader(
            dataset,
            eval_tokens=cfg.data_loader.eval_tokens,
            batch_tokens=batch_tokens or cfg.data_loader.first_batch_size // batch_ranks,
            rank=batch_rank,
            world_size=batch_ranks,
            vocab_size=corpus.vocab_size,
            is_held_out=name not in corpus.eval_sets,
        )
        for name, dataset in corpus.evaluation.items()
    }
    return train, evaluation


class TrainLoader:
    """Endless training batches. Their order depends on (fingerprint, seed) and the batch's number
    alone; rank r gets the r-th contiguous slice of each global batch.

    Attributes:
        sequence_length: tokens of the longest row.
        batches: sizes of batches and rows, tokens and epochs, durations as steps.
        batches_done: number of the next batch; `iterate` sets it as it yields.
        fingerprint, vocab_size, bytes_per_token, tokenizer_folder: of the training data.
        config: what `get_dataloaders` made it from; None: something else did.
        notice: what `load_state_dict` did differently from before, for a log; None: nothing.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: DataLoaderConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device | None = None,
    ) -> None:
        self.dataset = dataset = corpus.train
        self.global_batch_size = config.first_batch_size
        """Tokens of a batch until a schedule changes it."""
        self.sequence_length = dataset.sequence_length
        self.fingerprint = dataset.fingerprint
        self.bytes_per_token = dataset.bytes_per_token
        self.tokenizer_folder = dataset.tokenizer_folder
        self.vocab_size = corpus.vocab_size
        self.num_instances = dataset.num_instances
        self.batches_done = 0
        self.notice: str | None = None
        self.config: DataConfig | None = None
        self.corpus = corpus
        self._shuffle = config.shuffle
        self._prefetch_factor = config.prefetch_factor
        self._rank, self._world_size = rank, world_size
        self._device = device or torch.device("cpu")
        for (_, size), key in zip(config.batch_sizes, config.batch_size_keys, strict=True):
            check_batch_size(size, dataset.sequence_length, world_size, key)
        self._phases = config.phases(dataset.sequence_length)
        largest = max(segment.batch_instances for segment in corpus.order.segments)
        if corpus.order.epoch_instances < largest:
            have, length = corpus.order.epoch_instances, self.sequence_length
            fits = batch_that_fits(have, length, world_size)
            advice = (
                f"data_loader.global_batch_size {fits} fits"
                if fits
                else "make one of the two smaller"
            )
            raise DataError(
                f"not enough data for one batch: the training split has {have} instances of "
                f"dataset.sequence_length {length}, one batch of data_loader.global_batch_size "
                f"{largest * length} needs {largest}; {advice}, or give more text"
            )
        self._set_order(corpus.order)

    def _set_order(self, order: BatchOrder) -> None:
        self._order, self.batches = order, self.corpus.batches(order)

    @property
    def steps_per_epoch(self) -> float:
        """Whole global batches in one pass over the data; inf where a data set does not say."""
        steps = self._order.steps_per_epoch
        return steps if self.num_instances < UNKNOWN_LENGTH else math.inf

    @property
    def dropped_instances(self) -> int:
        """Instances that one epoch leaves out."""
        return self._order.dropped_instances

    def check_repetitions(self, steps: int) -> None:
        """Raise ConfigError when `steps` steps repeat a source of a mixture more than it may be."""
        if self.corpus.stream is not None:
            plan = self.corpus.stream.plan
            size = self._order.segment(steps).batch_instances
            check_limits(plan, self._position(steps), batch_instances=size)

    def instance_indices(self, batch_number: int) -> np.ndarray:
        """Instances of the global batch, shape `(rows,)`."""
        return self._order.indices(batch_number)[0]

    def global_batch(self, batch_number: int) -> Batch:
        """The global batch itself, all ranks' rows; see `iterate`."""
        rows = self.dataset.read(self.instance_indices(batch_number))
        return _cut(_tensors(rows), self._order.segment(batch_number).row_split)

    def counts(self, batches: int) -> dict[str, int]:
        """Instances drawn of each source of a mixture in the first `batches` batches."""
        stream = self.corpus.stream
        return stream.plan.counts(self._position(batches)) if stream is not None else {}

    def iterate(self, start_batch: int = 0) -> Generator[Batch, None, None]:
        """This rank's rows of batch `start_batch` and all that follow, over epochs without end.

        Yields `input_ids` int64 (rows, seq), and where the instances have them `label_mask` bool
        and `document_ids` int32 of the same shape; of preference and binary data `label_mask` is
        uint8, and `units` int64 (rows, K) are the numbers of the row's units.
        """
        self.batches_done = start_batch
        with contextlib.closing(self._batches(start_batch)) as batches:
            for batch in prefetch_to_device(batches, self._device):
                self.batches_done += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position and what gives it meaning; a few numbers."""
        return {
            "batch": self.batches_done,
            "segments": [list(segment) for segment in self._order.segments],
            "global_batch_size": self.global_batch_size,
            **self._identity(self.batches_done),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set `batches_done`; continue with `iterate(loader.batches_done)`. With another
        `global_batch_size`, the next batch starts at the first instance that was not used yet.

        Raises:
            DataError: when the state belongs to other data or another order.
            ConfigError: this kind of instances takes one batch size only.
        """
        now = self._identity(state["batch"], state.get("segments"))
        changed = changed_data(state, now, seed_key=self.corpus.seed_key)
        if changed:
            raise DataError(
                f"cannot continue with the next unseen batch: changed since the checkpoint: "
                f"{', '.join(changed)}; set it back, or go on anyway with a fresh data order by "
                "starting a new run with trainer.load_path and trainer.load_weights_only=true"
            )
        first = Segment(0, 0, state["global_batch_size"] // self.sequence_length)
        history = [Segment(*values) for values in state.get("segments", [first])]
        self.batches_done = state["batch"]
        planned = next(s for s in reversed(history) if s.first_batch <= self.batches_done)
        self._set_order(self._order.continued(history, self.batches_done, self._phases))
        segment = self._order.segment(self.batches_done)
        if planned.batch_instances != segment.batch_instances:
            length = self.sequence_length
            self.notice = (
                f"data_loader.global_batch_size {planned.batch_instances * length:,} -> "
                f"{segment.batch_instances * length:,} tokens: batch {self.batches_done:,} starts "
                f"at the next unseen instance, {segment.position:,} of the data stream"
            )

    def close(self) -> None:
        """End the workers of a custom data set."""
        self.corpus.close()

    def _identity(
        self, batch: int, segments: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Any]:
        """What decides the batches before `batch`."""
        identity: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "seed": self.corpus.seed,
            "shuffle": self._shuffle,
            "sequence_length": self.sequence_length,
        }
        if self._order.settings:
            identity["order"] = self._order.settings
        if self.corpus.stream is not None:
            position = self._position(batch, segments)
            identity["sources"] = self.corpus.stream.identity(position)
        return identity

    def _position(self, batch: int, segments: Sequence[Sequence[int]] | None = None) -> int:
        """Of a mixture's stream, after the last instance used before `batch`."""
        assert isinstance(self._order, StreamBatches)
        found = [Segment(*values) for values in segments or self._order.segments]
        return StreamBatches(self._order.stream, found).next_position(batch)

    def _batches(self, start_batch: int) -> Generator[Batch, None, None]:
        chunks = self._chunks(start_batch)
        if self._prefetch_factor:
            chunks = read_ahead(chunks, self._prefetch_factor, size=lambda chunk: chunk[1])
        with contextlib.closing(chunks):
            for rows, num_batches, row_split in chunks:
                tensors = _cut(_tensors(rows), row_split)
                if self._device.type == "cuda":
                    tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
                pieces = {key: tensor.chunk(num_batches) for key, tensor in tensors.items()}
                for number in range(num_batches):
                    yield {key: parts[number] for key, parts in pieces.items()}

    def _batches_at_once(self, batch: int) -> int:
        """How many batches of the size of this one are read together."""
        if not self._order.is_uniform or getattr(self.dataset, "is_slow_to_read", False):
            return 1
        instances = self._order.segment(batch).batch_instances
        return max(1, CHUNK_TOKENS // (instances // self._world_size * self.sequence_length))

    def _chunks(self, batch: int) -> Generator[tuple[Rows, int, int], None, None]:
        """This rank's rows of some batches at once, how many batches they are, and into how many
        each row is cut."""
        while True:
            segment, count = self._order.segment(batch), self._batches_at_once(batch)
            ahead = max(count, ORDERED_INSTANCES // segment.batch_instances)
            number = self._order.batches_in_segment(batch, ahead if self._order.is_uniform else 1)
            indices = self._order.indices(batch, number)
            per_batch = indices.shape[1] // self._world_size
            mine = indices[:, self._rank * per_batch : (self._rank + 1) * per_batch]
            for first in range(0, number, count):
                part = mine[first : first + count].reshape(-1)
                rows = self.dataset.read(part)
                check_ids(rows, part, self.vocab_size)
                yield rows, len(part) // per_batch, segment.row_split
            batch += number


def _tensors(rows: Rows) -> Batch:
    return {key: torch.from_numpy(value) for key, value in rows.items()}


def _cut(batch: Batch, row_split: int) -> Batch:
    """Each row as `row_split` rows of equal length, in place."""
    if row_split == 1:
        return batch
    return {key: t.reshape(len(t) * row_split, -1) for key, t in batch.items()}
