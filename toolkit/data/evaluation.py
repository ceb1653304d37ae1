"""`EvalLoader`: the validation instances, each on exactly one rank."""

import functools
from collections.abc import Iterator

import numpy as np
import torch

from toolkit.config.named import named
from toolkit.data.instances.base import InstanceDataset, Rows, check_ids

Batch = dict[str, torch.Tensor]
COUNTING_ROWS = 256
"""Instances read at once to count their bytes."""


class EvalLoader:
    """The first validation instances in file order, each one on exactly one rank. Every rank gets
    as many batches of the same shape; rows that fill up the last ones are masked.

    Attributes:
        num_instances: instances evaluated over all ranks.
        vocab_size: every id is below this; 0: not known.
        is_held_out: whether the instances were held out of the training data, and count in the sum
            of all that were.
        num_batches: batches of each rank.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        *,
        eval_tokens: int | None,
        batch_tokens: int,
        rank: int,
        world_size: int,
        vocab_size: int,
        is_held_out: bool = True,
    ) -> None:
        self.dataset = dataset
        self.sequence_length = dataset.sequence_length
        self.vocab_size = vocab_size
        self.is_held_out = is_held_out
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
        """UTF-8 bytes of text per token of the instances evaluated; 0.0: not known."""
        known, folder = self.dataset.bytes_per_token, self.dataset.tokenizer_folder
        if self.num_instances == self.dataset.num_instances or not known or folder is None:
            return known
        tokenizer = named("toolkit.data.prepare.tokenizers.tokenizer:load_tokenizer")(folder)
        num_bytes = num_tokens = 0
        for start in range(0, self.num_instances, COUNTING_ROWS):
            indices = np.arange(start, min(start + COUNTING_ROWS, self.num_instances))
            ids = real_tokens(self.dataset.read(indices))
            num_tokens += ids.size
            num_bytes += len(tokenizer.decode(ids[ids != tokenizer.eos_id].tolist()).encode())
        return num_bytes / num_tokens

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield `{"input_ids": int64 (rows, seq), "label_mask": bool (rows, seq)}`, and
        `document_ids` where the instances have them."""
        rows: Rows | None = None
        for number in range(self.num_batches):
            first = (number * self._world_size + self._rank) * self._rows
            indices = np.arange(first, min(first + self._rows, self.num_instances))
            if len(indices) or rows is None:
                wanted = indices if len(indices) else np.array([self.num_instances - 1])
                rows = self.dataset.read(wanted)
                check_ids(rows, wanted, self.vocab_size)
            # The last row fills up what is missing: reading one for it may run a user's code.
            places = np.arange(self._rows)
            is_real = places < len(indices)
            if not is_real.all():
                places = np.minimum(places, len(rows["input_ids"]) - 1)
                rows = {key: value[places] for key, value in rows.items()}
            mask = rows.get("label_mask", np.ones(rows["input_ids"].shape, dtype=bool))
            # A mask of units is of numbers.
            batch = {**rows, "label_mask": mask * is_real[:, None]}
            if "units" in rows:
                batch["units"] = np.where(is_real[:, None], rows["units"], -1)
            yield {key: torch.from_numpy(value) for key, value in batch.items()}


def real_tokens(rows: Rows) -> np.ndarray:
    """The ids of `rows` without padding, flat."""
    ids, documents, mask = rows["input_ids"], rows.get("document_ids"), rows.get("label_mask")
    if documents is None or mask is None:
        return ids.reshape(-1)
    # Padding is the last document of a row, and no target.
    is_last = documents == documents[:, -1:]
    has_target = (is_last & (mask != 0)).any(axis=1, keepdims=True)
    return ids[~is_last | has_target]
