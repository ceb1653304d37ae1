"""Loss, perplexity and bits per byte of a model on a stream of tokens."""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from toolkit.data.instances.base import Rows, target_mask
from toolkit.errors import DataError
from toolkit.evaluate.documents import Chunk
from toolkit.evaluate.windows import Window, stack_windows, windows
from toolkit.models.labels import shift_labels
from toolkit.models.loss import IGNORE_INDEX
from toolkit.train.eval_sums import Batch, EvalSums, LossFunction, TokenSums, sum_batches
from toolkit.wording import count


def evaluate_stream(
    chunks: Iterable[Chunk],
    loss_of: LossFunction,
    *,
    bytes_of: np.ndarray,
    sequence_length: int,
    stride: int | None = None,
    batch_tokens: int,
    mask_documents: bool = False,
) -> TokenSums:
    """Score every token of a stream that has a predecessor in its row.

    Args:
        bytes_of: `Tokenizer.token_bytes`: where vocabulary and text agree (byte-level tokenizers),
            the bytes of the scored tokens; else their share of the text's bytes.
        sequence_length: tokens of a row; the last one may be shorter.
        stride: see `toolkit.evaluate.windows`; default: `sequence_length`.
        batch_tokens: most tokens of a forward, at least one row. The numbers do not depend on it.
        mask_documents: attention stays inside documents, whose first tokens nothing predicts.

    Raises:
        DataError: no token has a predecessor.
    """
    started = time.perf_counter()
    bytes_seen = _BytesSeen(bytes_of)
    rows = windows(
        bytes_seen.all(chunks), sequence_length=sequence_length, stride=stride or sequence_length
    )
    num_rows = max(1, batch_tokens // sequence_length)

    def batches() -> Iterator[Batch]:
        for group in _groups(rows, num_rows):
            batch = stack_windows(group, mask_documents=mask_documents)
            bytes_seen.scored(batch)
            yield {key: torch.from_numpy(value) for key, value in batch.items()}

    totals = sum_batches(batches(), loss_of)
    assert totals is not None, "nothing asked to stop"
    loss, num_targets = totals.tolist()
    if not num_targets:
        tokens = count(bytes_seen.num_tokens, "token")
        raise DataError(
            f"{tokens} and none that another predicts; evaluation needs 2 or more in a row"
        )
    return TokenSums(loss, num_targets, bytes_seen.of_scored, time.perf_counter() - started)


def transformer_loss(
    model: nn.Module, device: torch.device, *, autocast: bool = False
) -> LossFunction:
    """What `model`, one of `toolkit.models`, says of a batch.

    Args:
        autocast: compute in bf16 over the model's fp32 weights, as training does.
    """
    model.eval()

    @torch.no_grad()
    def loss_of(batch: Batch) -> EvalSums:
        ids, labels, documents = _inputs(batch, device)
        with _autocast(device, enabled=autocast):
            sums: Any = model(ids, labels, document_ids=documents)
        return EvalSums(sums.ce, (labels != IGNORE_INDEX).sum())

    return loss_of


def causal_lm_loss(model: Any, device: torch.device) -> LossFunction:
    """What `model`, a causal language model of `transformers`, says of a batch without document
    masks; cross entropy of fp32 logits."""
    model.eval()

    @torch.no_grad()
    def loss_of(batch: Batch) -> EvalSums:
        ids, labels, documents = _inputs(batch, device)
        assert documents is None, "transformers models have no document masks"
        logits = model(input_ids=ids, use_cache=False).logits
        loss = sum(
            cross_entropy(row.float(), target, ignore_index=IGNORE_INDEX, reduction="sum").double()
            for row, target in zip(logits, labels, strict=True)
        )
        return EvalSums(torch.as_tensor(loss), (labels != IGNORE_INDEX).sum())

    return loss_of


class _BytesSeen:
    """Bytes of text, of all tokens and of the scored ones."""

    def __init__(self, bytes_of: np.ndarray) -> None:
        self._bytes_of = bytes_of
        self.num_tokens = 0
        self._text = self._all = self._scored = 0

    def all(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self.num_tokens += len(chunk.ids)
            self._text += chunk.num_bytes
            self._all += int(self._bytes_of[chunk.ids].sum())
            yield chunk

    def scored(self, rows: Rows) -> None:
        self._scored += int(self._bytes_of[rows["input_ids"][target_mask(rows)]].sum())

    @property
    def of_scored(self) -> float:
        return self._text * self._scored / self._all if self._all else 0.0


def _inputs(
    batch: Batch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    ids, documents = batch["input_ids"].to(device), batch.get("document_ids")
    mask = batch.get("label_mask")
    documents = None if documents is None else documents.to(device)
    return ids, shift_labels(ids, None if mask is None else mask.to(device), documents), documents


def _autocast(device: torch.device, *, enabled: bool) -> contextlib.AbstractContextManager:
    if enabled:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _groups(rows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while group := list(itertools.islice(rows, size)):
        yield group
