"""From the residual stream to logits, or straight to the loss."""

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig
from toolkit.models.liger import liger_linear_cross_entropy
from toolkit.models.loss import (
    ChunkKernel,
    LossSums,
    chunked_linear_cross_entropy,
    loss_chunk,
    soft_capped,
)
from toolkit.models.norms import build_norm


class Head(nn.Module):
    """Final norm and output projection.

    A tied head owns no weight: it is given the embedding's on each call. One Parameter object in
    two modules would come apart when a meta model is materialised.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.chunk_size = config.loss_chunk_size
        self.soft_cap = config.logit_soft_cap
        self.norm = build_norm(config, config.d_model)
        self.weight: nn.Parameter | None = None
        if not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))
        self.loss_kernel: ChunkKernel = loss_chunk

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None,
        tied_weight: Tensor | None,
        *,
        z_loss_multiplier: float = 0.0,
    ) -> Tensor | LossSums:
        """`(batch, seq, d_model)` to logits `(batch, seq, vocab_size)`, or with labels to sums."""
        weight = tied_weight if self.weight is None else self.weight
        assert weight is not None
        hidden = self.norm(x)
        if labels is None:
            logits = nn.functional.linear(hidden, weight)[..., : self.vocab_size]
            return logits if self.soft_cap is None else soft_capped(logits, self.soft_cap)
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        sums = liger_linear_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_size=self.vocab_size,
            z_loss_multiplier=z_loss_multiplier,
            soft_cap=self.soft_cap,
            is_compiled=self.loss_kernel is not loss_chunk,
        )
        if sums is not None:
            return sums
        return chunked_linear_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_size=self.vocab_size,
            z_loss_multiplier=z_loss_multiplier,
            soft_cap=self.soft_cap,
            chunk_size=self.chunk_size,
            kernel=self.loss_kernel,
        )
