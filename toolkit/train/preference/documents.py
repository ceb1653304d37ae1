"""Batches of units: two documents each, and sums over the tokens of a document."""

from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.models.loss import IGNORE_INDEX
from toolkit.train.eval_sums import Batch

NOT_A_TARGET, CHOSEN, REJECTED, MISMATCHED = 0, 1, 2, 3
"""What `label_mask` says of a token: of the prompt or padding; of a chosen or desirable answer; of
a rejected or undesirable one; of an answer that belongs to another prompt."""


class UnitBatch(NamedTuple):
    """Rows of units, on the device.

    Documents are numbered in each row from 0: documents 2k and 2k + 1 are those of unit k. Padding
    at the end of a row is a document of its own, with a higher number.
    """

    input_ids: Tensor
    """`(rows, seq)`."""
    labels: Tensor
    """`(rows, seq)`: what follows each token inside its document, -100 where nobody asks."""
    document_ids: Tensor
    """`(rows, seq)`."""
    kinds: Tensor
    """`(rows, seq)` uint8: the mask of the token that follows, of those in `labels`."""
    units: Tensor
    """`(rows, K)` int64: the number of each unit in its split, -1 where there is none."""
    reference: Tensor | None = None
    """`(rows, K, 2)`: log-probabilities of both answers under the reference model."""
    dropout_keys: Tensor | None = None
    """`(rows, seq)`, see `toolkit.models.adapter_state`; None: adapters have no dropout."""

    @property
    def is_unit(self) -> Tensor:
        """`(rows, K)`, whether there is a unit."""
        return self.units >= 0

    def split(self, rows: int) -> "list[UnitBatch]":
        """Parts of `rows` rows, the last of what is left."""
        given = {k: t.split(rows) for k, t in self._asdict().items() if t is not None}
        parts = zip(*given.values(), strict=True)
        return [UnitBatch(**dict(zip(given, part, strict=True))) for part in parts]


def unit_batch(batch: Batch, device: torch.device, *, with_prompts: bool) -> UnitBatch:
    """A batch of the data loader; `with_prompts`: of chosen and scored documents, all tokens are
    labels, not just those of the answer."""
    keys = ("input_ids", "label_mask", "document_ids", "units", "reference_log_probs")
    moved = {key: batch[key].to(device, non_blocking=True) for key in keys if key in batch}
    ids, mask, documents = moved["input_ids"], moved["label_mask"], moved["document_ids"]
    units = moved["units"]
    kinds = torch.zeros_like(mask, dtype=torch.uint8)
    inside = (documents[:, 1:] == documents[:, :-1]) & (
        documents[:, 1:] < 2 * (units >= 0).sum(1, keepdim=True)
    )
    kinds[:, :-1] = mask[:, 1:].to(torch.uint8) * inside
    wanted = inside if with_prompts else kinds[:, :-1] > 0
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = torch.where(wanted, ids[:, 1:], IGNORE_INDEX)
    return UnitBatch(ids, labels, documents, kinds, units, moved.get("reference_log_probs"))


def document_sums(values: Tensor, batch: UnitBatch) -> Tensor:
    """Sums of `values`, `(rows, seq)`, over each document of a unit: `(rows, K, 2)`.

    Products with a mask and not a scatter, which adds up in no fixed order on GPUs.
    """
    rows, number = batch.units.shape
    document = torch.arange(2 * number, device=values.device)
    mine = batch.document_ids[..., None] == document
    return (values[..., None] * mine).sum(1).view(rows, number, 2)


def last_tokens(batch: UnitBatch) -> Tensor:
    """`(rows, seq)`, whether the token is the last one of a document of a unit."""
    documents = batch.document_ids
    is_last = torch.ones_like(documents, dtype=torch.bool)
    is_last[:, :-1] = documents[:, 1:] != documents[:, :-1]
    return is_last & (documents < 2 * batch.is_unit.sum(1, keepdim=True))
