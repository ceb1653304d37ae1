"""Several documents in one row: where each begins, and the positions of its tokens.

1. `document_starts` finds, once per forward, where the document of each token begins.
2. A token's position is counted from there.
3. Attention reaches back no further (`masks.py`).

Rows without documents take none of these steps: plain causal attention is faster.
"""

import torch
from torch import Tensor


def document_starts(document_ids: Tensor) -> Tensor:
    """Place in its row where each token's document begins, `(batch, seq)` int64.

    A document is a stretch of equal numbers in `document_ids`, `(batch, seq)` of integers.
    """
    place = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_first, place, 0).cummax(dim=1).values


def document_positions(starts: Tensor) -> Tensor:
    """Position of each token in its document, `(batch, seq)` int64."""
    return torch.arange(starts.shape[1], device=starts.device) - starts
