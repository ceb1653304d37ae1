"""Reward models leave as `...ForSequenceClassification`, give equal scores there, and come back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny import tiny_model
from toolkit.errors import CheckpointError
from toolkit.hf.choose import choose_family
from toolkit.hf.compare import compare_with_transformers
from toolkit.hf.export import export_hf
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Family
from toolkit.hf.read_config import read_hf_config
from toolkit.hf.source import find_source, source_tensors
from toolkit.models.config import GPTConfig, ModelConfig
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig

QWEN3_5: dict[str, Any] = {
    "qk_norm": "per_head",
    "norm_weight_offset": 1.0,
    "attention_gate": "elementwise",
    "attention_pattern": ("linear", "full"),
    "delta_net": DeltaNetConfig(
        num_key_heads=2, num_value_heads=2, key_head_dim=8, value_head_dim=8, norm_eps=1e-5
    ),
}
MODELS: dict[str, ModelConfig] = {
    "llama": tiny_model(num_scores=1, vocab_multiple=1),
    "qwen3": tiny_model(num_scores=1, qk_norm="per_head", tie_embeddings=True, head_dim=8),
    "qwen3_5_text": tiny_model(num_scores=1, num_layers=2, **QWEN3_5),
    "olmo2": tiny_model(num_scores=1, qk_norm="full", norm_placement="reordered"),
    "gpt2": GPTConfig(vocab_size=100, n_positions=32, n_embd=32, n_layer=1, n_head=2, num_scores=1),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_scores_are_equal_and_come_back(tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    model = config.build(seed=3)
    tensors = dict(model.named_parameters())
    exported = export_hf(config, tensors, tmp_path / "out")
    assert exported.architecture.endswith("ForSequenceClassification")
    assert choose_family(config).model_type == name
    assert compare_with_transformers(tmp_path / "out", config, tensors.items()) < 1e-4
    read = read_hf_config(tmp_path / "out")
    assert read.config.num_scores == 1
    back = dict(source_tensors(find_source(tmp_path / "out")))
    assert back.keys() == tensors.keys()
    vocab = config.vocab_size
    for key, tensor in tensors.items():
        assert torch.equal(back[key][:vocab], tensor[:vocab]), key


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_families_know_whether_there_is_a_class_for_scores(family: Family) -> None:
    scored = family.class_of(tiny_model(num_scores=1))
    assert family.can_score == (scored in dir(transformers))


def test_a_family_without_the_class_is_refused(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, normalize_top_k=False)
    config = tiny_model(num_scores=1, qk_norm="full", num_key_value_heads=4, moe=moe)
    with pytest.raises(CheckpointError, match="no transformers class"):
        export_hf(config, dict(config.build().named_parameters()), tmp_path / "out")
