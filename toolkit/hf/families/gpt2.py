"""GPT2LMHeadModel."""

from typing import Any

from toolkit.hf.families.fields import read_init_std, read_plain_activation, write_activation
from toolkit.hf.family import Family, Rule, rules_of
from toolkit.hf.settings import Settings
from toolkit.hf.transforms import TRANSPOSED, joined
from toolkit.models.config import TransformerConfig

_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_OTHER_HEADS = (
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout",
)  # fmt: skip
"""Of classes that share this config and have another head."""


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    is_usual = config.intermediate_size == 4 * config.d_model
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_sequence_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if is_usual else config.intermediate_size,
        "activation_function": write_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(_DROPOUT, 0.0),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    settings.require("scale_attn_weights", True)
    settings.require("scale_attn_by_inverse_layer_idx", False)
    settings.require("add_cross_attention", False)
    settings.without_effect(*_DROPOUT, "reorder_and_upcast_attn")
    for name in _OTHER_HEADS:
        settings.take(name, None)
    width = settings.take("n_embd")
    return {
        "vocab_size": settings.take("vocab_size"),
        "d_model": width,
        "num_layers": settings.take("n_layer"),
        "num_heads": settings.take("n_head"),
        "intermediate_size": settings.take("n_inner", None) or 4 * width,
        "max_sequence_length": settings.take("n_positions"),
        "norm": "layer_norm",
        "norm_eps": settings.take("layer_norm_epsilon"),
        "positions": "learned",
        "feed_forward": read_plain_activation(settings, "activation_function"),
        "bias": True,
        "tie_embeddings": settings.take("tie_word_embeddings"),
        "init_std": read_init_std(settings),
        "init_scale_residual": True,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    both = ("weight", "bias")
    queries_keys_values = joined([config.d_model] * 3, transposed=True)
    rules = [
        Rule(("embeddings.tokens.weight",), ("transformer.wte.weight",)),
        Rule(("embeddings.positions.weight",), ("transformer.wpe.weight",)),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        rules += rules_of(f"{ours}.attention_norm", f"{theirs}.ln_1", both)
        rules += rules_of(f"{ours}.feed_forward_norm", f"{theirs}.ln_2", both)
        parts = [f"{ours}.attention.{part}" for part in ("query", "key", "value")]
        for kind, transform in (
            ("weight", queries_keys_values),
            ("bias", queries_keys_values._replace(transposed=False)),
        ):
            names = tuple(f"{part}.{kind}" for part in parts)
            rules.append(Rule(names, (f"{theirs}.attn.c_attn.{kind}",), transform))
        for name, part in (
            ("attn.c_proj", "attention.output"),
            ("mlp.c_fc", "feed_forward.up"),
            ("mlp.c_proj", "feed_forward.down"),
        ):
            rules += rules_of(f"{ours}.{part}", f"{theirs}.{name}", ("weight",), TRANSPOSED)
            rules += rules_of(f"{ours}.{part}", f"{theirs}.{name}", ("bias",))
    rules += rules_of("head.norm", "transformer.ln_f", both)
    if not config.tie_embeddings:
        rules.append(Rule(("head.weight",), ("lm_head.weight",)))
    return rules


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    write_config=_write_config,
    read_config=_read_config,
    rules=_rules,
    base_prefix="transformer.",
    buffers=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),
)
