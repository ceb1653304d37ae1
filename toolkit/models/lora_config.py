"""Config of low-rank adapters."""

import math
from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_positive


class LoRAConfig(Config, kw_only=True):
    """Low-rank adapters (Hu et al. 2021): W x becomes W x + (alpha / rank) B A x."""

    rank: int = 16
    """Rows of A and columns of B; at most the narrower side of each layer."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply it by alpha / sqrt(rank) instead, so that a larger rank learns no slower (rsLoRA,
    Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of W + (alpha / rank) B A by itself (DoRA, Liu et al. 2024).
    For linear layers; not with `quantize_base`."""
    dropout: float = 0.0
    """Share of the adapter's inputs that each training step sets to zero; not for experts. Which
    ones depends on (seed, step, row, position, layer) alone."""
    target_modules: tuple[str, ...] = ("*.attention.*", "*.feed_forward.*")
    """Shell-style patterns over names of layers that get an adapter: linear ones
    (`blocks.0.attention.query`, `blocks.0.feed_forward.down`), experts
    (`blocks.0.feed_forward.experts.up`), and by its full name `embeddings.tokens`. A pattern that
    matches none is an error."""
    trainable_tokens: tuple[int, ...] = ()
    """Ids of tokens whose rows are trained, of the embedding and of a head that is not tied to it;
    all other rows stay as they are. For tokens that were added."""
    train_also: tuple[str, ...] = ()
    """Shell-style patterns over names of parameters that are trained whole besides, for example
    `head.norm.*`."""
    quantize_base: Literal["nf4", "int8"] | None = None
    """Keep the weights of linear layers with an adapter in 4 bits (NF4 of QLoRA, Dettmers et al.
    2023) or in 8 (a scale for each row); null: fp32. For `single` and `ddp`."""
    quantize_all: bool = False
    """With `quantize_base`: also linear layers of blocks that have no adapter."""

    def __post_init__(self) -> None:
        check_positive(self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout: {self.dropout} is no share; give a number from 0 to below 1"
            )
        if self.quantize_all and self.quantize_base is None:
            raise ValueError("quantize_all: needs quantize_base; set it to nf4 or int8")
        if self.dora and self.quantize_base is not None:
            raise ValueError(
                f"dora: needs the weights that quantize_base {self.quantize_base} rounds; leave "
                "one of them out"
            )
        if not self.target_modules and not self.trainable_tokens:
            raise ValueError("target_modules: empty; name the layers that get an adapter")
        if len(set(self.trainable_tokens)) < len(self.trainable_tokens):
            twice = next(t for t in self.trainable_tokens if self.trainable_tokens.count(t) > 1)
            raise ValueError(f"trainable_tokens: {twice} is named twice; name each token once")

    @property
    def adapts_vocabulary(self) -> bool:
        """Whether there are adapters on embeddings, or rows of tokens that are trained."""
        return bool(self.trainable_tokens) or "embeddings.tokens" in self.target_modules

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
