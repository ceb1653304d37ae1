"""The GPT-2 family: the same Transformer, configured in GPT-2's vocabulary."""

from toolkit.models.config import GPTConfig
from toolkit.models.transformer import Transformer


class GPTModel(Transformer):
    """`GPTModel(GPTConfig(...))`: learned positions, LayerNorm, GELU, biases, tied head."""

    def __init__(self, config: GPTConfig, *, init_device: str = "cpu", seed: int = 0) -> None:
        """Build on `init_device` with the initial values of `seed`; "meta": without storage."""
        super().__init__(config.to_transformer(), init_device=init_device, seed=seed)
        self.gpt_config = config
