"""The two ends of the residual stream: from token ids, and to logits or the loss."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig
from toolkit.models.log_probs import TokenValues
from toolkit.models.loss import (
    IGNORE_INDEX,
    LinearCrossEntropy,
    LossSums,
    MTPSums,
    soft_capped,
)
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
        self.logit_scale = config.logit_scale
        self.mtp_loss_multiplier = config.mtp_loss_multiplier
        self.norm: nn.Module
        self.weight: nn.Parameter | None = None
        self.score: nn.Linear | None = None
        if config.num_scores is not None:
            self.score = nn.Linear(config.d_model, config.num_scores, bias=False)
        elif not config.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))
        self.scale: nn.Parameter | None = None
        if config.is_normalized:
            self.norm = nn.Identity()
            self.scale = nn.Parameter(torch.empty(config.padded_vocab_size))
            self.scale_factor = config.d_model**0.5
        else:
            self.norm = build_norm(config, config.d_model)
        self.token_rows: nn.Module | None = None
        """Puts the rows of some tokens in the place of its own (`TrainedRows`)."""
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
        further: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]] | None = None,
    ) -> Any:
        """`(batch, seq, d_model)` to logits `(batch, seq, vocab_size)`, or with labels to what
        `loss` makes of them. A head that scores gives `(batch, seq, num_scores)`, with labels the
        first score of each token as `TokenValues`.

        `further`, from the normed `x`: hidden states with their labels, of which this head predicts
        too; see `toolkit.models.mtp`.
        """
        normed = self.norm(x)
        if self.score is not None:
            scores = self.score(normed)
            return scores if labels is None else TokenValues(widened(scores[..., 0]).clone())
        weight = tied_weight if self.weight is None else self.weight
        assert weight is not None
        if self.token_rows is not None:
            weight = self.token_rows(weight)
        hidden = self._scaled(normed)
        if self.scale is not None:  # of the logits, which nobody has to write out for it
            weight = weight * (self.scale.to(weight.dtype) * self.scale_factor)[:, None]
        if labels is not None:
            sums = self.loss(hidden, weight, labels, z_loss_multiplier=z_loss_multiplier)
            return sums if further is None else self._with(sums, weight, list(further(normed)))
        logits = self.project(hidden, weight)[..., : self.vocab_size]
        return logits if self.soft_cap is None else soft_capped(logits, self.soft_cap)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.logit_scale == 1.0 else hidden * self.logit_scale

    def _with(
        self, sums: LossSums, weight: Tensor, further: list[tuple[Tensor, Tensor]]
    ) -> LossSums:
        """The sums with the mean of the losses of `further`, weighted."""
        count = sums.ce.new_zeros((), dtype=torch.int64)
        loss = torch.zeros_like(sums.ce)
        for hidden, labels in further:
            rows = self._scaled(hidden).flatten(0, 1)
            loss = loss + self.loss(rows, weight, labels.flatten()).loss
            count = count + (labels != IGNORE_INDEX).sum()
        total = sums.loss + loss * (self.mtp_loss_multiplier / len(further))
        return sums._replace(loss=total, mtp=MTPSums(loss.detach(), count))
