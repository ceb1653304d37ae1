"""The check that two configs are the same model sees every field, or the reason is given here."""

from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from toolkit.config import Config
from toolkit.hf.choose import defining_values, differences
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig
from toolkit.models.rope_scaling import LinearRopeConfig, Llama3RopeConfig, YarnRopeConfig

BASE = TransformerConfig(
    vocab_size=64,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    sliding_window=8,
    attention_pattern=("sliding", "full"),
    moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=24, dense_layers=(0,), num_groups=2),
)
HYBRID = BASE.replace(
    attention_pattern=("linear", "full"),
    delta_net=DeltaNetConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=8, norm_placement="pre"
    ),
)
LINEAR = LinearRopeConfig(factor=2)
LLAMA3 = Llama3RopeConfig(
    factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64
)
YARN = YarnRopeConfig(factor=4, original_max_position_embeddings=64)

CHANGED: dict[str, Any] = {
    "vocab_size": 65,
    "d_model": 64,
    "num_layers": 4,
    "num_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_sequence_length": 4096,
    "norm": "layer_norm",
    "norm_eps": 1e-6,
    "norm_weights": False,
    "norm_weight_offset": 1.0,
    "norm_placement": "sandwich",
    "residual_scale": 0.5,
    "parallel_residual": True,
    "shared_norm": True,
    "qk_norm": "full",
    "positions": "learned",
    "rope_pattern": ("rope", "none"),
    "rope_theta": 5e5,
    "rope_scaling": LINEAR,
    "rotary_fraction": 0.5,
    "sliding_rope_theta": 1e3,
    "sliding_window": 9,
    "attention_pattern": ("full", "sliding"),
    "attention_gate": "headwise",
    "attention_sinks": True,
    "clip_qkv": 8.0,
    "attention_scale": 0.5,
    "attention_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
    "logit_scale": 0.5,
    "embedding_scale": 2.0,
    "feed_forward": "geglu",
    "moe": None,
    "bias": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "tie_embeddings": True,
    "moe.num_experts": 6,
    "moe.top_k": 3,
    "moe.intermediate_size": 20,
    "moe.normalize_top_k": False,
    "moe.shared_expert_intermediate_size": 8,
    "moe.dense_layers": (),
    "delta_net.num_key_heads": 4,
    "delta_net.num_value_heads": 2,
    "delta_net.key_head_dim": 8,
    "delta_net.value_head_dim": 4,
    "delta_net.conv_kernel_size": 3,
    "delta_net.allow_negative_eigenvalues": True,
    "delta_net.norm_eps": 1e-5,
    "delta_net.norm_placement": "reordered",
    "num_scores": 1,
    "moe.score_function": "sigmoid",
    "moe.scaling_factor": 2.0,
    "moe.num_groups": 4,
    "moe.top_k_groups": 2,
    "moe.bias_update_rate": 0.0,
    "linear.factor": 3,
    "llama3.factor": 4,
    "llama3.low_freq_factor": 2,
    "llama3.high_freq_factor": 5,
    "llama3.original_max_position_embeddings": 32,
    "yarn.factor": 3,
    "yarn.original_max_position_embeddings": 32,
    "yarn.beta_fast": 16.0,
    "yarn.beta_slow": 2.0,
    "yarn.attention_factor": 1.5,
    "yarn.mscale": 0.7,
    "yarn.mscale_all_dim": 0.7,
    "yarn.truncate": False,
}
"""Another valid value of each field."""

NEEDS: dict[str, dict[str, Any]] = {
    "norm_weights": {"norm": "layer_norm"},
    "shared_norm": {"parallel_residual": True},
}
"""What a field goes with."""

NO_MATTER = {
    "vocab_multiple": "rows of padding, which no id reaches and no export holds",
    "init_std": "only training from scratch draws initial values",
    "init_scale_residual": "the same",
    "loss_chunk_size": "bounds memory; the sum is the same",
    "delta_net": "without linear layers there are none; see delta_net.*",
    "delta_net.min_decay_rate": "only training from scratch draws initial values",
    "delta_net.max_decay_rate": "the same",
    "delta_net.min_time_step": "the same",
    "delta_net.max_time_step": "the same",
    "moe.load_balancing_multiplier": "a term of the training loss, not of the logits",
    "moe.router_z_loss_multiplier": "the same",
    "num_mtp_layers": "they predict in training alone, and exports leave them out",
    "mtp_loss_multiplier": "a term of the training loss, not of the logits",
}

SCALINGS = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}


def change(name: str, value: Any) -> tuple[TransformerConfig, TransformerConfig]:
    """A config, and the same with another value of field `name`."""
    section, _, field = name.rpartition(".")
    if section in SCALINGS:
        scaling = SCALINGS[section]
        before = BASE.replace(rope_scaling=scaling)
        return before, before.replace(rope_scaling=scaling.replace(**{field: value}))
    if section == "delta_net":
        assert HYBRID.delta_net is not None
        return HYBRID, HYBRID.replace(delta_net=HYBRID.delta_net.replace(**{field: value}))
    if name == "delta_net":  # of a model too short for the linear layers of its pattern
        before = HYBRID.replace(num_layers=1, attention_pattern=("full", "linear"), moe=None)
        return before, before.replace(attention_pattern=("full",), delta_net=None)
    if name in NEEDS:
        before = BASE.replace(**NEEDS[name])
        return before, before.replace(**{field: value})
    if section == "moe":
        assert BASE.moe is not None
        return BASE, BASE.replace(moe=BASE.moe.replace(**{field: value}))
    return BASE, BASE.replace(**{field: value})


@pytest.mark.parametrize("name", CHANGED)
def test_another_value_of_a_field_is_a_difference(name: str) -> None:
    before, after = change(name, CHANGED[name])
    assert before != after
    assert differences(before, after)
    assert differences(after, before)
    assert not differences(before, before)


@pytest.mark.parametrize("name", NO_MATTER)
def test_fields_that_do_not_matter_are_none(name: str) -> None:
    section, _, field = name.rpartition(".")
    value = getattr({"": BASE, "moe": BASE.moe, "delta_net": HYBRID.delta_net}[section], field)
    factor = 2 if isinstance(value, int) else 1.5
    before, after = change(name, not value if isinstance(value, bool) else (value or 1) * factor)
    assert before != after
    assert not differences(before, after)


def test_every_field_of_the_config_and_its_sections_is_in_one_of_the_two_lists() -> None:
    sections = {"": TransformerConfig, "moe.": MoEConfig, "delta_net.": DeltaNetConfig}
    sections |= {f"{name}.": type(scaling) for name, scaling in SCALINGS.items()}
    fields = {
        prefix + field.name
        for prefix, kind in sections.items()
        for field in msgspec.structs.fields(kind)
    }
    assert CHANGED.keys() | NO_MATTER.keys() == fields
    assert not CHANGED.keys() & NO_MATTER.keys()
    parts = [
        part
        for kind in sections.values()
        for hint in get_type_hints(kind).values()
        for part in (hint, *get_args(hint))
        if isinstance(part, type) and issubclass(part, Config)
    ]
    assert set(parts) == set(sections.values()) - {TransformerConfig}


def test_biases_of_layer_norms_count_beside_those_of_linear_layers() -> None:
    linear = {"qkv_bias": False, "attention_output_bias": False, "feed_forward_bias": False}
    config = BASE.replace(norm="layer_norm", **linear)
    assert differences(config, config.replace(bias=True)) == ["bias False"]
    assert defining_values(BASE)["bias"] is None
