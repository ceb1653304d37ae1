"""The example of docs/finetuning.md: one table makes another architecture known."""

import pytest
import torch

from tests.hf.fidelity import pair, their_config
from toolkit.hf import choose, read_config
from toolkit.hf.choose import hf_architecture
from toolkit.hf.families import FAMILIES
from toolkit.hf.families.llama import PRE_NORMS, PROJECTIONS, SHARED
from toolkit.hf.families.parts import renamed, without_effect
from toolkit.hf.families.rope import ROPE
from toolkit.hf.family import Family

SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    parts=(
        *SHARED,
        ROPE,
        renamed(
            head_dim="head_dim",
            qkv_bias="attention_bias",
            attention_output_bias="attention_out_bias",
            feed_forward_bias="mlp_bias",
        ),
        without_effect("pretraining_tp", "residual_dropout"),
    ),
    block=PROJECTIONS | PRE_NORMS,
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
