"""From token ids to the residual stream."""

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig


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
        """`(batch, seq)` ids to `(batch, seq, d_model)` in the compute type.

        `positions`, `(batch, seq)`: of each token in its document; default: in its row.
        """
        x = self._compute_type(self.tokens(input_ids))
        if self.scale != 1.0:
            x = x * torch.tensor(self.scale, dtype=x.dtype).item()
        if self.positions is not None:
            if positions is None:
                positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            x = x + self._compute_type(self.positions(positions))
        return x

    @staticmethod
    def _compute_type(x: Tensor) -> Tensor:
        # Autocast leaves lookups in fp32. Casting here keeps the residual stream in the compute
        # type, as it is under FSDP2, whose gathered tables are already in it.
        if torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x
