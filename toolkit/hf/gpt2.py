"""GPT2LMHeadModel."""

from typing import Any

from toolkit.hf.family import Family, Rule, joined, joined_transposed, same, transposed
from toolkit.models.config import TransformerConfig


def _fits(config: TransformerConfig) -> bool:
    return (
        config.norm == "layer_norm"
        and config.norm_placement == "pre"
        and config.qk_norm == "none"
        and config.positions == "learned"
        and config.feed_forward == "gelu"
        and config.bias
        and config.kv_heads == config.num_heads
        and config.num_heads * config.attention_head_dim == config.d_model
    )


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_sequence_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _rules(config: TransformerConfig) -> list[Rule]:
    rules = [
        Rule("transformer.wte.weight", ("embeddings.tokens.weight",), same),
        Rule("transformer.wpe.weight", ("embeddings.positions.weight",), same),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        projections = [f"{ours}.attention.{part}" for part in ("query", "key", "value")]
        for name, norm in (("ln_1", "attention_norm"), ("ln_2", "feed_forward_norm")):
            for kind in ("weight", "bias"):
                rules.append(Rule(f"{theirs}.{name}.{kind}", (f"{ours}.{norm}.{kind}",), same))
        weights = tuple(f"{projection}.weight" for projection in projections)
        biases = tuple(f"{projection}.bias" for projection in projections)
        rules.append(Rule(f"{theirs}.attn.c_attn.weight", weights, joined_transposed))
        rules.append(Rule(f"{theirs}.attn.c_attn.bias", biases, joined))
        for name, part in (
            ("attn.c_proj", "attention.output"),
            ("mlp.c_fc", "feed_forward.up"),
            ("mlp.c_proj", "feed_forward.down"),
        ):
            rules.append(Rule(f"{theirs}.{name}.weight", (f"{ours}.{part}.weight",), transposed))
            rules.append(Rule(f"{theirs}.{name}.bias", (f"{ours}.{part}.bias",), same))
    rules.append(Rule("transformer.ln_f.weight", ("head.norm.weight",), same))
    rules.append(Rule("transformer.ln_f.bias", ("head.norm.bias",), same))
    if not config.tie_embeddings:
        rules.append(Rule("lm_head.weight", ("head.weight",), same))
    return rules


GPT2 = Family("GPT2LMHeadModel", _fits, _config, _rules)
