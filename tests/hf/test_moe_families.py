"""Mixtures of experts: the load-balancing loss means what it means there; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.fidelity import pair, tensors_of, their_config
from toolkit.errors import CheckpointError
from toolkit.hf.choose import misfits
from toolkit.hf.compare import compare_with_transformers
from toolkit.hf.export import export_hf
from toolkit.hf.families import FAMILIES
from toolkit.hf.read_config import read_hf_config
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig

QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "score_function": "sigmoid", "bias_update_rate": 0.001, "num_groups": 2, "scaling_factor": 2.5
}  # fmt: skip
OURS = TransformerConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=48,
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24),
)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
        ("qwen3_moe", {**QWEN, "num_experts_per_tok": 3}),
        ("olmoe", {"num_experts": 6, "num_experts_per_tok": 4}),
    ],
)
def test_load_balancing_has_the_weight_it_has_there(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """One instance and one layer: there it is taken over a whole batch and all layers at once."""
    config = their_config(
        model_type, **fields, router_aux_loss_coef=0.3, num_hidden_layers=1, hidden_size=72
    )
    theirs, ours, read, _ = pair(config, tmp_path)
    assert read.config.moe is not None
    ours.config = read.config
    ids = torch.randint(101, (1, 20), generator=torch.Generator().manual_seed(1))
    out = theirs(ids, labels=ids, output_router_logits=True)
    # Every token counts there, the last one too; which token it is to predict does not matter.
    sums = ours(ids, ids)
    added = (sums.loss - sums.ce).item() / 20
    assert added == pytest.approx(0.3 * out.aux_loss.item(), rel=1e-5)
    assert added > 0.3


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "top_k 9 is more than num_experts 8"),
        ("qwen3_moe", {**QWEN, "decoder_sparse_step": 3}, "leave no layer with experts"),
        ("mixtral", {"hidden_act": "relu"}, "hidden_act 'relu' is not covered"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    model_type: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    their_config(model_type, **fields).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(tmp_path)


def test_heads_of_glm_are_passed_over_and_said(tmp_path: Path) -> None:
    """Files of GLM 4.5 have blocks after the last one, which transformers does not load either."""
    fields = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
        "num_mtp_layers": 1,
    }  # fmt: skip
    theirs, _, read, _ = pair(their_config("glm4_moe", **fields), tmp_path)
    state = theirs.state_dict()
    state["model.layers.2.enorm.weight"] = torch.ones(36)
    theirs.save_pretrained(tmp_path, state_dict=state)
    assert read.config.num_mtp_layers == 0
    assert sum("1" in note and "_layers" in note for note in read.notes) == 1
    assert any("bias_update_rate" in note for note in read.notes)
    assert tensors_of(read, tmp_path)["blocks.1.feed_forward.router.score_bias"].abs().max() > 0
    state["model.layers.1.enorm.weight"] = torch.ones(36)
    theirs.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"layers\.1\.enorm\.weight is not in the"):
        tensors_of(read, tmp_path)


def test_exports_leave_multi_token_prediction_out(tmp_path: Path) -> None:
    config = OURS.replace(num_mtp_layers=1)
    state = config.build().state_dict()
    exported = export_hf(config, state, tmp_path / "out")
    assert exported.left_out == "1 module for multi-token prediction"
    compare_with_transformers(tmp_path / "out", config, state.items(), all_used=True)


def test_noise_of_the_original_router_is_noted(tmp_path: Path) -> None:
    their_config("mixtral", router_jitter_noise=0.1).save_pretrained(tmp_path)
    assert read_hf_config(tmp_path).notes == (
        "router_jitter_noise 0.1 of the original is not used in training",
    )


@pytest.mark.parametrize(
    ("changes", "fitting"),
    [
        ({}, ["mixtral"]),
        ({"qk_norm": "per_head"}, ["qwen3_moe"]),
        ({"qk_norm": "full"}, ["olmoe"]),
        ({"qk_norm": "full", "sliding_window": 8}, []),
        ({"qk_norm": "per_head", "sliding_window": 8}, ["qwen3_moe"]),
        ({"qkv_bias": True}, []),
    ],
)
def test_families_that_can_hold_a_mixture(changes: dict[str, Any], fitting: list[str]) -> None:
    config = OURS.replace(**changes)
    assert [family.model_type for family in FAMILIES if not misfits(family, config)] == fitting


@pytest.mark.parametrize(
    ("changes", "fitting"),
    [
        ({"dense_layers": (0,)}, ["qwen3_moe"]),
        ({**DEEPSEEK, "shared_expert_intermediate_size": 48}, ["glm4_moe"]),
        ({**DEEPSEEK, "shared_expert_intermediate_size": 36}, []),  # no whole number of experts
        (DEEPSEEK, []),
        ({**DEEPSEEK, "shared_expert_intermediate_size": 24, "dense_layers": (1,)}, []),
        ({"score_function": "sigmoid", "shared_expert_intermediate_size": 24}, []),
        ({"normalize_top_k": False}, ["qwen3_moe"]),
        ({"shared_expert_intermediate_size": 8}, []),
    ],
)
def test_not_every_mixture_fits(changes: dict[str, Any], fitting: list[str]) -> None:
    assert OURS.moe is not None
    config = OURS.replace(qk_norm="per_head", moe=OURS.moe.replace(**changes))
    assert [family.model_type for family in FAMILIES if not misfits(family, config)] == fitting
