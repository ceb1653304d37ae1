"""The decoder-only Transformer, put together."""

from typing import overload

import torch
from torch import Tensor, nn

from toolkit.models.block import Block
from toolkit.models.config import TransformerConfig
from toolkit.models.documents import document_positions, document_starts
from toolkit.models.embeddings import Embeddings
from toolkit.models.head import Head
from toolkit.models.init import initialize_
from toolkit.models.layer_inputs import layer_inputs
from toolkit.models.loss import IGNORE_INDEX, LossSums
from toolkit.models.router_loss import RouterSums, combine_layers, router_loss


class Transformer(nn.Module):
    """Embeddings, blocks, head. Knows nothing of devices' number, shards or precision policies.

    Under autocast the residual stream is in autocast's type from the embedding on, so fp32 weights
    under autocast and low-precision copies of them (FSDP2) compute the same numbers.
    """

    def __init__(
        self, config: TransformerConfig, *, init_device: str = "cpu", seed: int = 0
    ) -> None:
        """Build on `init_device` with the initial values of `seed`; "meta": without storage."""
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embeddings = Embeddings(config)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
            self.head = Head(config)
        if init_device != "meta":
            self.to_empty(device=init_device)
            initialize_(self, seed)

    @overload
    def forward(
        self, input_ids: Tensor, labels: None = None, *, document_ids: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        document_ids: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
    ) -> LossSums: ...

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
    ) -> Tensor | LossSums:
        """Logits, or the sums of the loss.

        Args:
            input_ids: `(batch, seq)` int64.
            labels: `(batch, seq)` int64, already shifted: `labels[b, t]` is what follows
                `input_ids[b, t]`; -100 where there is no target.
            document_ids: `(batch, seq)` of integers: attention stays inside stretches of equal
                numbers, positions start over with each; default: each row is one document.
            z_loss_multiplier: weight of logsumexp(logits)^2 in the loss.

        Returns:
            Without labels: `(batch, seq, vocab_size)` in the compute type, no padding ids.
            With labels: `LossSums` over the target tokens (sums, not means: the caller divides by
            the number of targets of the global batch).

        Raises:
            ValueError: for a sequence longer than `config.max_sequence_length`, or document ids of
                another shape than the input ids.
        """
        config, seq = self.config, input_ids.shape[1]
        if seq > config.max_sequence_length:
            raise ValueError(
                f"sequence of {seq} tokens is longer than model.max_sequence_length "
                f"{config.max_sequence_length}; raise that or shorten the sequences"
            )
        starts, positions = None, None
        if document_ids is not None:
            _check_same_shape(document_ids, input_ids)
            starts = document_starts(document_ids)
            positions = document_positions(starts)
        x = self.embeddings(input_ids, positions)
        is_target = None if labels is None or config.moe is None else labels != IGNORE_INDEX
        routers: list[RouterSums] = []
        inputs = layer_inputs(config, x, starts, positions)
        for block, (rotary, mask) in zip(self.blocks, inputs, strict=True):
            x, sums = block(x, rotary, mask, is_target)
            if sums is not None:
                routers.append(sums)
        tied_weight = self.embeddings.tokens.weight if config.tie_embeddings else None
        result = self.head(x, labels, tied_weight, z_loss_multiplier=z_loss_multiplier)
        if config.moe is not None and routers:
            router = combine_layers(routers)
            result = result._replace(
                loss=result.loss + router_loss(router, config.moe), router=router.detached()
            )
        return result


def _check_same_shape(document_ids: Tensor, input_ids: Tensor) -> None:
    if document_ids.shape != input_ids.shape:
        raise ValueError(
            f"document_ids have the shape {tuple(document_ids.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; give one document number per token"
        )
