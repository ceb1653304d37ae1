"""Config of a mixture of experts."""

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
    softmax over all experts (OLMoE)."""
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
            self, "num_experts", "top_k", "intermediate_size", "shared_expert_intermediate_size"
        )
        check_not_negative(self, "load_balancing_multiplier", "router_z_loss_multiplier")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
