"""Config of low-rank adapters."""

from toolkit.config import Config
from toolkit.config.base import check_positive


class LoRAConfig(Config, kw_only=True):
    """Low-rank adapters (Hu et al. 2021) through `peft`: W x becomes W x + (alpha / rank) B A x."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ("*.attention.*", "*.feed_forward.*")
    """Shell-style patterns over names of linear layers that get an adapter
    (`blocks.0.attention.query`, `blocks.0.feed_forward.down`). A pattern that matches none is an
    error."""
    train_also: tuple[str, ...] = ()
    """Shell-style patterns over names of parameters that are trained whole besides, for example
    `embeddings.*` after new tokens were added."""

    def __post_init__(self) -> None:
        check_positive(self, "rank", "alpha")
        if not self.target_modules:
            raise ValueError("target_modules: empty; name the layers that get an adapter")
