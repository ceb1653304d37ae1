"""The two ends of the residual stream: from token ids, and to logits or the loss."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig
from toolkit.models.log_probs import TokenValues
from toolkit.models.loss import LinearCrossEntropy, soft_capped
from toolkit.models.norms import build_norm, widened


class Embeddings(nn.Module):
    """A row per token id, scaled, and one per position when positions are learned."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = config.embedding_scale
        self.tokens = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_sequence_length, config.d_model)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """`(batch, seq)` ids to `(batch, seq, d_model)` in the compute type. `positions`,
        `(batch, seq)`: of each token in its document; default: in its row."""
        x = self._compute_type(self.tokens(input_ids))
        if self.scale != 1.0:
            x = x * torch.tensor(self.scale, dtype=x.dtype).item()
        if self.positions is not None:
            if positions is None:
                positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            x = x + self._compute_type(self.positions(positions))
        return x

    def tied_copy(self) -> "Embeddings":
        """The token rows alone, in new memory, for a head elsewhere that is tied to them."""
        other = copy.deepcopy(self)
        other.positions = None
        return other

    @staticmethod
    def _compute_type(x: Tensor) -> Tensor:
        # Autocast leaves lookups in fp32. Casting here keeps the residual stream in the compute
        # type, as it is under FSDP2, whose gathered tables are already in it.
        if torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x


class Head(nn.Module):
    """Final norm and output projection. A tied head owns no weight: it is given the embedding's on
    each call. One Parameter in two modules would come apart when a meta model is materialised."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.soft_cap = config.logit_soft_cap
        self.norm = build_norm(config, config.d_model)
        self.weight: nn.Parameter | None = None
        self.score: nn.Linear | None = None
        if config.num_scores is not None:
            self.score = nn.Linear(config.d_model, config.num_scores, bias=False)
        elif not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))
        self.loss = LinearCrossEntropy(config)
        self.project: Callable[[Tensor, Tensor], Tensor] = nn.functional.linear
        """Hidden states and weight to logits; who cuts the vocabulary puts another in its place."""

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None,
        tied_weight: Tensor | None,
        *,
        z_loss_multiplier: float = 0.0,
    ) -> Any:
        """`(batch, seq, d_model)` to logits `(batch, seq, vocab_size)`, or with labels to what
        `loss` makes of them. A head that scores gives `(batch, seq, num_scores)`, with labels the
        first score of each token as `TokenValues`."""
        hidden = self.norm(x)
        if self.score is not None:
            scores = self.score(hidden)
            return scores if labels is None else TokenValues(widened(scores[..., 0]).clone())
        weight = tied_weight if self.weight is None else self.weight
        assert weight is not None
        if labels is not None:
            return self.loss(hidden, weight, labels, z_loss_multiplier=z_loss_multiplier)
        logits = self.project(hidden, weight)[..., : self.vocab_size]
        return logits if self.soft_cap is None else soft_capped(logits, self.soft_cap)
