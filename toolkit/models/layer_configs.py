"""What experts and linear attention are made of."""

from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive


class MoEConfig(Config, frozen=True, kw_only=True):
    """Feed-forward layers of which each token uses a few (Shazeer et al. 2017).

    Dropless: every token reaches all of its experts, however unevenly they are chosen.
    """

    num_experts: int
    """Routed experts per layer."""
    top_k: int
    """Experts of one token."""
    intermediate_size: int
    """Hidden width of one expert."""
    normalize_top_k: bool = True
    """Scale the weights of a token's experts to sum to one (Mixtral, Qwen 3). Off: they are the
    scores of all experts as they are (OLMoE)."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What makes the router's logits scores: a softmax over all experts, or a sigmoid of each
    (DeepSeek-V3, 2024)."""
    scaling_factor: float = 1.0
    """Multiplies the weights of a token's experts (DeepSeek's routed_scaling_factor)."""
    num_groups: int = 1
    """Groups of consecutive experts. A token first chooses `top_k_groups` groups, and its experts
    among theirs. A group's score is the sum of its two highest (DeepSeek-V3), with softmax its
    highest (DeepSeek-V2)."""
    top_k_groups: int = 1
    """Groups of one token."""
    bias_update_rate: float | None = None
    """Balance experts without a loss (Wang et al. 2024): each has a bias, which is added to its
    score when experts are chosen and never to their weights. After each optimizer step the bias
    of every expert that got fewer target tokens of the global batch than the mean goes up by this,
    of every one that got more goes down. 0: biases stay as they are; null: there are none."""
    shared_expert_intermediate_size: int | None = None
    """Hidden width of an expert that all tokens use besides the routed ones; null: none."""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that have an ordinary feed-forward of `model.intermediate_size`."""
    load_balancing_multiplier: float = 0.01
    """Weight in the loss of the load-balancing loss, num_experts * sum over experts of (share of
    assignments * mean probability) inside each instance, mean over target tokens and layers. Per
    instance (DeepSeek-V3, 2024), so that it does not depend on how a batch is split."""
    router_z_loss_multiplier: float = 0.0
    """Weight in the loss of logsumexp(router logits)^2, mean over target tokens and layers (ST-MoE,
    Zoph et al. 2022)."""

    def __post_init__(self) -> None:
        check_positive(
            self, "num_experts", "top_k", "intermediate_size", "shared_expert_intermediate_size",
            "scaling_factor", "num_groups", "top_k_groups",
        )  # fmt: skip
        check_not_negative(
            self, "load_balancing_multiplier", "router_z_loss_multiplier", "bias_update_rate"
        )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts {self.num_experts} is not divisible by num_groups {self.num_groups}"
            )
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"top_k_groups {self.top_k_groups} is more than num_groups {self.num_groups}"
            )
        if self.top_k > (reachable := self.top_k_groups * self.group_size):
            raise ValueError(
                f"top_k {self.top_k} is more than the {reachable} experts of {self.top_k_groups} "
                f"of {self.num_groups} groups; raise top_k_groups or lower top_k"
            )
        if self.num_groups > 1 and self.group_size == 1 and self.score_function == "sigmoid":
            raise ValueError(
                f"num_groups {self.num_groups} leaves one expert a group, of whose two highest "
                "scores a group's is the sum; use fewer groups"
            )

    @property
    def group_size(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.num_groups


class DeltaNetConfig(Config, frozen=True, kw_only=True):
    """Layers of linear attention by the gated delta rule (Gated DeltaNet, Yang et al. 2024): in the
    place of keys and values of all tokens before it, a head keeps one matrix of key_head_dim x
    value_head_dim numbers. See `toolkit.models.delta_net`."""

    num_key_heads: int
    """Heads of queries and keys."""
    num_value_heads: int
    """Heads of values, a multiple of `num_key_heads`; consecutive ones share a key head."""
    key_head_dim: int
    """Width of one head of queries and keys."""
    value_head_dim: int
    """Width of one head of values."""
    conv_kernel_size: int = 4
    """Tokens that the short convolution of queries, keys and values sees: each and those right
    before it."""
    allow_negative_eigenvalues: bool = False
    """Write strengths go up to 2 instead of 1, so that a step can turn what is kept along a key
    around (Grazzi et al. 2024; OLMo-hybrid)."""
    norm_eps: float = 1e-6
    """Added to the variance in the norm of each head's output."""
    norm_placement: Literal["pre", "reordered"] | None = None
    """`norm_placement` of the blocks with such a layer (OLMo-hybrid: `pre`, its other blocks
    `reordered`); null: as in the other blocks."""
    min_decay_rate: float = 0.0
    """Initial decay rates, exp(A_log), are uniform between this and `max_decay_rate`."""
    max_decay_rate: float = 16.0
    """See `min_decay_rate`."""
    min_time_step: float = 0.001
    """Initial time steps, softplus(dt_bias), are between this and `max_time_step`, uniform in their
    logarithm."""
    max_time_step: float = 0.1
    """See `min_time_step`."""

    def __post_init__(self) -> None:
        check_positive(
            self, "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim",
            "conv_kernel_size", "norm_eps", "max_decay_rate", "min_time_step", "max_time_step",
        )  # fmt: skip
        check_not_negative(self, "min_decay_rate")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads {self.num_value_heads} is not a multiple of num_key_heads "
                f"{self.num_key_heads}"
            )
        for name in ("decay_rate", "time_step"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(f"min_{name} {least} is more than max_{name} {most}")

    @property
    def key_width(self) -> int:
        """Of all heads of queries, and of keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Of all heads of values."""
        return self.num_value_heads * self.value_head_dim
