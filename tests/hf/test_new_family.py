"""The example of docs/finetuning.md: one table makes another architecture known."""

from typing import Any

import pytest
import torch

from tests.hf.fidelity import pair, their_config
from toolkit.hf import choose, read_config
from toolkit.hf.choose import hf_architecture
from toolkit.hf.families import FAMILIES
from toolkit.hf.families.llama import PRE_NORMS, decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig


def write(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        **write_rope(config),
        "head_dim": config.attention_head_dim,
        "attention_bias": config.has_qkv_bias,
        "attention_out_bias": config.has_attention_output_bias,
        "mlp_bias": config.has_feed_forward_bias,
    }


def read(settings: Settings) -> dict[str, Any]:
    settings.without_effect("pretraining_tp", "residual_dropout")
    return {
        **read_shared(settings),
        **read_rope(settings),
        "head_dim": settings.take("head_dim"),
        "qkv_bias": settings.take("attention_bias"),
        "attention_output_bias": settings.take("attention_out_bias"),
        "feed_forward_bias": settings.take("mlp_bias"),
    }


SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    write_config=write,
    read_config=read,
    rules=lambda config: decoder_rules(config, PRE_NORMS),
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for module in (read_config, choose):
        monkeypatch.setattr(module, "FAMILIES", (*FAMILIES, SEED_OSS))


def test_a_table_is_all_that_a_new_family_needs(tmp_path):
    models = pair(their_config("seed_oss", head_dim=16), tmp_path)
    config = models.read.config
    assert (config.has_qkv_bias, config.has_attention_output_bias) == (True, False)
    assert hf_architecture(config, "seed_oss") == "SeedOssForCausalLM"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs, ours = models.theirs(ids).logits, models.ours(ids)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
