"""Multi-token prediction: further blocks, each of which looks one token further ahead.

Module k of `num_mtp_layers` (DeepSeek-V3 2024, section 2.2, in the form that `transformers` runs,
`MtpLayer`):

    h_k = block(projection [embedding_norm(embedding of token i + k); hidden_norm(h_{k-1})])

h_0 is the model's last hidden state behind its final norm, h_k has a norm of its own behind it, and
the model's output head makes of h_k the logits of token i + k + 1. Embedding and head are shared.
Heads are for training: they give gradients to the model before them, and change none of its logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig
from toolkit.models.loss import IGNORE_INDEX
from toolkit.models.norms import build_norm
from toolkit.models.router import RouterSums


class MTPLayer(nn.Module):
    """One further block with what joins it to the state before; see this file's head."""

    def __init__(self, config: TransformerConfig, block: nn.Module) -> None:
        super().__init__()
        width = config.d_model
        self.embedding_norm = build_norm(config, width)
        self.hidden_norm = build_norm(config, width)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.norm = build_norm(config, width)

    def forward(
        self, embedded: Tensor, hidden: Tensor, rotary: object, mask: object, is_target: Tensor
    ) -> tuple[Tensor, RouterSums | None]:
        """The next hidden state, `(batch, seq, d_model)`, of two of that shape, and the router's
        sums over the tokens of `is_target`; see `Block.forward`."""
        joined = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        x, sums = self.block(self.projection(joined), rotary, mask, is_target)
        return self.norm(x), sums


class Ahead(NamedTuple):
    """What module k is given, and what it is to predict, `(batch, seq)` int64 each."""

    input_ids: Tensor
    """The token k places ahead; where that is in another document, some token of this one."""
    labels: Tensor
    """What follows that token, -100 where it is no target or in another document."""


def ahead(input_ids: Tensor, labels: Tensor, starts: Tensor | None, distance: int) -> Ahead:
    """See `Ahead`; `labels` are those of the model, `starts` see `document_starts`."""
    length = input_ids.shape[1]
    place = torch.arange(length, device=input_ids.device)
    moved = (place + distance).clamp(max=length - 1)
    is_inside = (place + distance < length).expand(input_ids.shape)
    if starts is not None:
        is_inside = is_inside & (starts[:, moved] == starts)
    return Ahead(
        torch.where(is_inside, input_ids[:, moved], input_ids),
        torch.where(is_inside, labels[:, moved], IGNORE_INDEX),
    )
