"""How rotary positions are stretched beyond the length that a model was trained at."""

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive


class LinearRopeConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="linear"):
    """Positions are divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float
    """How many times longer sequences become."""

    def __post_init__(self) -> None:
        check_positive(self, "factor")


class Llama3RopeConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="llama3"):
    """Slow frequencies are divided by `factor`, fast ones stay, those between go over smoothly
    (Llama 3.1, Dubey et al. 2024)."""

    factor: float
    """What slow frequencies are divided by."""
    low_freq_factor: float
    """Frequencies that turn fewer times than this in the original length are slow."""
    high_freq_factor: float
    """Those that turn more often than this are fast."""
    original_max_position_embeddings: int
    """Length in tokens that the model was trained at before."""

    def __post_init__(self) -> None:
        check_positive(
            self, "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings",
        )  # fmt: skip
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be greater than low_freq_factor "
                f"{self.low_freq_factor}"
            )


class YarnRopeConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="yarn"):
    """Interpolation by frequency, and hotter attention (YaRN, Peng et al. 2023)."""

    factor: float
    """How many times longer sequences become."""
    original_max_position_embeddings: int
    """Length in tokens that the model was trained at before."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this in the original length stay as they are."""
    beta_slow: float = 1.0
    """Those that turn fewer times are divided by `factor`."""
    attention_factor: float | None = None
    """Multiplies cosines and sines; default: 0.1 * ln(factor) + 1, or by the two below."""
    mscale: float | None = None
    """With `mscale_all_dim`: the default of `attention_factor` is the quotient of
    0.1 * m * ln(factor) + 1 for m = this and m = that (DeepSeek-V2)."""
    mscale_all_dim: float | None = None
    """See `mscale`."""
    truncate: bool = True
    """Round the channels where the transition begins and ends to whole ones."""

    def __post_init__(self) -> None:
        check_positive(
            self, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
            "attention_factor",
        )  # fmt: skip
        check_not_negative(self, "mscale", "mscale_all_dim")


RopeScalingConfig = LinearRopeConfig | Llama3RopeConfig | YarnRopeConfig
