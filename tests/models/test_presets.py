"""Presets have the parameters that the models of their names were published with."""

from typing import Any

import pytest
import torch

from toolkit.config.check import convert
from toolkit.models.config import TransformerConfig
from toolkit.models.presets import PRESETS

_LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8}
_OLMO: dict[str, Any] = {"vocab_size": 100_352}
_SMOL: dict[str, Any] = {"vocab_size": 49_152, "tie_word_embeddings": True}
_QWEN: dict[str, Any] = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}


def _shape(hidden: int, layers: int, heads: int, inner: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": inner, **others,
    }  # fmt: skip


# The values of each config.json on the hub, and what transformers builds of it.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_8B": ("Llama", _shape(4096, 32, 32, 14336, **_LLAMA)),
    "llama3_70B": ("Llama", _shape(8192, 80, 64, 28672, **_LLAMA)),
    "olmo2_1B": ("Olmo2", _shape(2048, 16, 16, 8192, **_OLMO)),
    "olmo2_7B": ("Olmo2", _shape(4096, 32, 32, 11008, **_OLMO)),
    "olmo2_13B": ("Olmo2", _shape(5120, 40, 40, 13824, **_OLMO)),
    "olmo_hybrid_7B": ("OlmoHybrid", _shape(3840, 32, 30, 11008, **_OLMO)),
    "olmo2_32B": ("Olmo2", _shape(5120, 64, 40, 27648, num_key_value_heads=8, **_OLMO)),
    "smollm2_135M": ("Llama", _shape(576, 30, 9, 1536, num_key_value_heads=3, **_SMOL)),
    "smollm2_360M": ("Llama", _shape(960, 32, 15, 2560, num_key_value_heads=5, **_SMOL)),
    "qwen3_0.6B": ("Qwen3", _shape(1024, 28, 16, 3072, tie_word_embeddings=True, **_QWEN)),
    "qwen3_1.7B": ("Qwen3", _shape(2048, 28, 16, 6144, tie_word_embeddings=True, **_QWEN)),
    "qwen3_4B": ("Qwen3", _shape(2560, 36, 32, 9728, tie_word_embeddings=True, **_QWEN)),
    "qwen3_8B": ("Qwen3", _shape(4096, 36, 32, 12288, **_QWEN)),
    "qwen3_14B": ("Qwen3", _shape(5120, 40, 40, 17408, **_QWEN)),
    "qwen3_32B": ("Qwen3", _shape(5120, 64, 64, 25600, **_QWEN)),
    "qwen3_30B_A3B": (
        "Qwen3Moe",
        _shape(2048, 48, 32, 6144, **_QWEN)
        | {
            "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}  # fmt: skip


def counted(name: str) -> TransformerConfig:
    fields = {key: value for key, value in PRESETS[name].items() if key != "type"}
    return convert(fields, TransformerConfig)


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_transformers_builds_of_the_published_config(name: str) -> None:
    import transformers

    family, fields = PUBLISHED[name]
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    assert counted(name).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("llama3_70B", 70_553_706_496, None),
        ("olmo2_7B", 7_298_617_344, None),
        ("olmo2_32B", 32_234_279_936, None),
        ("qwen3_0.6B", 596_049_920, None),
        ("qwen3_30B_A3B", 30_532_122_624, 3_353_032_704),
    ],
)
def test_numbers_of_parameters(name: str, total: int, active: int | None) -> None:
    config = counted(name)
    assert config.num_parameters == total
    assert config.num_active_parameters == (active or total)
