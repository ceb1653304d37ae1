"""GPTNeoXForCausalLM (Pythia): layer norms, a rope for a part of each head, mostly attention and
feed-forward side by side."""

from typing import Any

from toolkit.hf.families.fields import (
    check_whole_heads,
    read_attention_bias,
    read_init_std,
    read_plain_activation,
    write_activation,
)
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family, Rule, rules_of
from toolkit.hf.settings import Settings
from toolkit.hf.transforms import interleaved
from toolkit.models.config import TransformerConfig

_MODULES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.dense_h_to_4h": "feed_forward.up",
    "mlp.dense_4h_to_h": "feed_forward.down",
}
_DROPOUT = ("attention_dropout", "hidden_dropout")


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config)
    # Without it the class would rotate a quarter.
    rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": write_activation(config),
        "max_position_embeddings": config.max_sequence_length,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.has_qkv_bias,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **rope,
        # Read by transformers < 5.
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_fraction,
        **dict.fromkeys(_DROPOUT, 0.0),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    check_whole_heads(settings)
    settings.without_effect(*_DROPOUT, "is_decoder")
    # Of classes that share this config and have another head.
    settings.take("classifier_dropout", None)
    return {
        "vocab_size": settings.take("vocab_size"),
        "d_model": settings.take("hidden_size"),
        "intermediate_size": settings.take("intermediate_size"),
        "num_layers": settings.take("num_hidden_layers"),
        "num_heads": settings.take("num_attention_heads"),
        "max_sequence_length": settings.take("max_position_embeddings"),
        "norm": "layer_norm",
        "norm_eps": settings.take("layer_norm_eps"),
        "parallel_residual": settings.take("use_parallel_residual"),
        "positions": "rope",
        "feed_forward": read_plain_activation(settings, "hidden_act"),
        "bias": True,
        **read_attention_bias(settings),
        "init_std": read_init_std(settings),
        "tie_embeddings": settings.take("tie_word_embeddings"),
        **read_rope(settings, is_partial=True),
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    both = ("weight", "bias")
    rules = [Rule(("embeddings.tokens.weight",), ("gpt_neox.embed_in.weight",))]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        for name, part in _MODULES.items():
            rules += rules_of(f"{ours}.{part}", f"{theirs}.{name}", both)
        kinds = both if config.has_qkv_bias else ("weight",)
        for kind in kinds:
            parts = tuple(f"{ours}.attention.{part}.{kind}" for part in ("query", "key", "value"))
            fused = f"{theirs}.attention.query_key_value.{kind}"
            rules.append(Rule(parts, (fused,), interleaved(config.num_heads)))
        rules += rules_of(f"{ours}.attention.output", f"{theirs}.attention.dense", kinds)
    rules += rules_of("head.norm", "gpt_neox.final_layer_norm", both)
    if not config.tie_embeddings:
        # In files; since transformers 5 the module is called lm_head.
        rules.append(Rule(("head.weight",), ("embed_out.weight",)))
    return rules


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=_rules,
    base_prefix="gpt_neox.",
    buffers=(
        r".*\.attention\.bias",
        r".*\.attention\.masked_bias",
        r".*\.rotary_emb\.inv_freq",
    ),
)
