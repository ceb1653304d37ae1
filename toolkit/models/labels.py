"""Next-token targets."""

import torch
from torch import Tensor

from toolkit.models.loss import IGNORE_INDEX


def shift_labels(
    input_ids: Tensor, label_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Next-token targets (batch, seq): shifted inside each document, -100 where there is none.

    Args:
        label_mask: (batch, seq), bool: which tokens of `input_ids` are targets, by position.
        document_ids: (batch, seq): the first token of a document is nobody's target. Default: each
            row is one document.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    wanted = None if label_mask is None else label_mask[:, 1:]
    if document_ids is not None:
        inside = document_ids[:, 1:] == document_ids[:, :-1]
        wanted = inside if wanted is None else wanted & inside
    following = input_ids[:, 1:]
    labels[:, :-1] = following if wanted is None else torch.where(wanted, following, IGNORE_INDEX)
    return labels
