"""What families with a mixture of experts have alike, both ways."""

from collections.abc import Iterable
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.llama import attention_rules, projection_rules
from toolkit.hf.family import Rule
from toolkit.hf.layouts import STACKED
from toolkit.hf.settings import Settings
from toolkit.models.architecture import MoEConfig
from toolkit.models.config import TransformerConfig

GATE_UP_DOWN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Our names of an expert's matrices and the usual ones."""


def read_experts(
    settings: Settings,
    *,
    num_experts: str = "num_experts",
    intermediate_size: str = "intermediate_size",
    normalize_top_k: bool,
    dense_layers: Iterable[int] = (),
) -> MoEConfig:
    """Our experts; `num_experts` and `intermediate_size` are the names of their fields.

    The shares of assignments in the load-balancing loss of `transformers` sum to the number of
    experts of a token, in ours to one: its coefficient counts so many times more.

    Raises:
        CheckpointError: the numbers do not fit each other.
    """
    settings.without_effect("output_router_logits")
    try:
        top_k = settings.take("num_experts_per_tok")
        return MoEConfig(
            num_experts=settings.take(num_experts),
            top_k=top_k,
            intermediate_size=settings.take(intermediate_size),
            normalize_top_k=normalize_top_k,
            dense_layers=tuple(dense_layers),
            load_balancing_multiplier=settings.take("router_aux_loss_coef") * top_k,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: not a model that can be built: {error}") from None


def write_experts(
    config: TransformerConfig,
    *,
    num_experts: str = "num_experts",
    intermediate_size: str = "intermediate_size",
) -> dict[str, Any]:
    """Fields of config.json for our experts; none where there are none."""
    moe = config.moe
    if moe is None:
        return {}
    return {
        num_experts: moe.num_experts,
        intermediate_size: moe.intermediate_size,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.load_balancing_multiplier / moe.top_k,
    }


def expert_rules(
    config: TransformerConfig,
    layer: int,
    *,
    module: str = "mlp",
    names: dict[str, str] = GATE_UP_DOWN,
) -> list[Rule]:
    """Rules of a layer's attention and experts, which they keep as one tensor each; of a layer
    without experts, those of its feed-forward.

    Args:
        config: of the model.
        layer: counted from 0.
        module: their name of the part that holds router and experts.
        names: our matrices -> theirs.
    """
    moe = config.moe
    if moe is None or layer not in config.moe_layers:
        return projection_rules(config, layer)
    ours, theirs = f"blocks.{layer}.feed_forward", f"model.layers.{layer}.{module}"
    rules = attention_rules(config, layer)
    rules.append(Rule((f"{ours}.router.weight",), (f"{theirs}.gate.weight",)))
    for part, name in names.items():
        each = tuple(f"{theirs}.experts.{n}.{name}.weight" for n in range(moe.num_experts))
        rules.append(Rule((f"{ours}.experts.{part}",), each, STACKED))
    return rules
