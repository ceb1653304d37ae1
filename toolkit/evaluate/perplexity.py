"""Loss, perplexity and bits per byte of a model on a stream of tokens."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from toolkit.data.instances.base import target_mask
from toolkit.errors import DataError
from toolkit.evaluate.stream import Chunk, stack_windows, windows
from toolkit.models.loss import IGNORE_INDEX, shift_labels
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
    """Score every token of a stream that has a predecessor in its row. Raises DataError where none
    has one.

    Args:
        bytes_of: `Tokenizer.token_bytes`: where vocabulary and text agree (byte-level tokenizers),
            the bytes of the scored tokens; else their share of the text's bytes.
        sequence_length: tokens of a row; the last one may be shorter.
        stride: see `toolkit.evaluate.stream`; default: `sequence_length`.
        batch_tokens: most tokens of a forward, at least one row. The numbers do not depend on it.
        mask_documents: attention stays inside documents, whose first tokens nothing predicts.
    """
    started = time.perf_counter()
    num_tokens = text_bytes = all_bytes = scored_bytes = 0

    def seen() -> Iterator[Chunk]:
        nonlocal num_tokens, text_bytes, all_bytes
        for chunk in chunks:
            num_tokens += len(chunk.ids)
            text_bytes += chunk.num_bytes
            all_bytes += int(bytes_of[chunk.ids].sum())
            yield chunk

    def batches() -> Iterator[Batch]:
        nonlocal scored_bytes
        rows = windows(seen(), sequence_length=sequence_length, stride=stride or sequence_length)
        while group := list(itertools.islice(rows, max(1, batch_tokens // sequence_length))):
            batch = stack_windows(group, mask_documents=mask_documents)
            scored_bytes += int(bytes_of[batch["input_ids"][target_mask(batch)]].sum())
            yield {key: torch.from_numpy(value) for key, value in batch.items()}

    totals = sum_batches(batches(), loss_of)
    assert totals is not None, "nothing asked to stop"
    loss, num_targets = totals.tolist()
    if not num_targets:
        raise DataError(
            f"{count(num_tokens, 'token')} and none that another predicts; evaluation needs 2 or "
            "more in a row"
        )
    num_bytes = text_bytes * scored_bytes / all_bytes if all_bytes else 0.0
    return TokenSums(loss, num_targets, num_bytes, time.perf_counter() - started)


def computing_in(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """A context that computes in `dtype` over fp32 weights, as training does; None: in their
    own."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def transformer_loss(
    model: nn.Module, device: torch.device, *, computed_in: torch.dtype | None = None
) -> LossFunction:
    """What `model`, one of `toolkit.models`, says of a batch; `computed_in` as in
    `computing_in`."""

    def loss_of(ids: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
        with computing_in(computed_in, device):
            sums: Any = model(ids, labels, document_ids=documents)
        return sums.ce

    return _loss_function(model, device, loss_of)


def causal_lm_loss(model: Any, device: torch.device) -> LossFunction:
    """What `model`, a causal language model of `transformers`, says of a batch without document
    masks; cross entropy of fp32 logits."""

    def loss_of(ids: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
        assert documents is None, "transformers models have no document masks"
        logits = model(input_ids=ids, use_cache=False).logits
        losses = [
            cross_entropy(row.float(), target, ignore_index=IGNORE_INDEX, reduction="sum").double()
            for row, target in zip(logits, labels, strict=True)
        ]
        return torch.stack(losses).sum()

    return _loss_function(model, device, loss_of)


def _loss_function(
    model: nn.Module,
    device: torch.device,
    loss_of: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> LossFunction:
    model.eval()

    @torch.no_grad()
    def sums_of(batch: Batch) -> EvalSums:
        on_device = {key: value.to(device) for key, value in batch.items()}
        ids, documents = on_device["input_ids"], on_device.get("document_ids")
        labels = shift_labels(ids, on_device.get("label_mask"), documents)
        return EvalSums(loss_of(ids, labels, documents), (labels != IGNORE_INDEX).sum())

    return sums_of
