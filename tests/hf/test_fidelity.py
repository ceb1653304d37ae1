"""Models of `transformers` give their logits and gradients here, and come back unchanged."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.hf.cases import DENSE, HYBRID, MOE
from tests.hf.fidelity import Pair, pair, tensors_of, their_config
from toolkit.hf.choose import misfits
from toolkit.hf.export import export_hf
from toolkit.hf.loading import quiet_transformers
from toolkit.models.loss import IGNORE_INDEX
from toolkit.models.shapes import SCORE_BIAS

CASES = DENSE | MOE | HYBRID
SEQUENCE = 40
"""Longer than every window, and than the original length of scaled ropes."""

_NO_MATTER = {
    # About generation, or dropout, or merged by the config class into other fields.
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "max_window_layers", "original_max_position_embeddings",
    # Together they name the layers without experts, in several ways.
    "decoder_sparse_step", "mlp_only_layers",
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory) -> Pair:
    model_type, fields = CASES[request.param]
    return pair(their_config(model_type, **fields), tmp_path_factory.mktemp("hf"))


def batch() -> torch.Tensor:
    return torch.randint(101, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))


def test_logits_are_equal(models):
    ids = batch()
    with torch.no_grad():
        theirs, ours = models.theirs(ids).logits, models.ours(ids)
    assert ours.shape == theirs.shape == (2, SEQUENCE, 101)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_gradients_are_equal(models, tmp_path):
    ids = batch()
    targets = ids[:, 1:]
    logits = models.theirs(ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    labels = torch.cat([targets, torch.full((2, 1), IGNORE_INDEX)], dim=1)
    (models.ours(ids, labels).loss / targets.numel()).backward()
    # Saved and read like weights, so that they get our names and layout.
    theirs = {name: p.grad for name, p in models.theirs.named_parameters()} | biases_of(models)
    models.theirs.save_pretrained(tmp_path, state_dict=theirs)
    expected = {
        name: tensor
        for name, tensor in tensors_of(models.read, tmp_path).items()
        if not name.endswith(SCORE_BIAS)
    }
    ours = {name: p.grad for name, p in models.ours.named_parameters()}
    models.theirs.zero_grad()
    models.ours.zero_grad()
    assert ours.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        error = float((ours[name] - tensor).abs().max())
        # Keys' biases without rope have no gradient but rounding.
        assert error <= 1e-4 * float(tensor.abs().max()) + 1e-7 * largest, name


def test_model_comes_back_equal(models, tmp_path):
    family, config, _ = models.read
    assert not misfits(family, config)
    out = tmp_path / "out"
    export_hf(config, tensors_of(models.read, models.folder), out, model_type=family.model_type)
    assert_bit_equal(tensors_in(out), tensors_in(models.folder), torch.float32)
    with quiet_transformers():
        again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert meaning(again.config) == meaning(models.theirs.config)
    ids = batch()
    with torch.no_grad():
        logits, expected = again(ids).logits, models.theirs(ids).logits
    # One formula may have several names, which round differently.
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_several_files_of_bf16_come_back_bit_equal(models, tmp_path):
    state = {name: p.detach().bfloat16() for name, p in models.theirs.named_parameters()}
    state |= biases_of(models)  # which stay in fp32
    models.theirs.save_pretrained(tmp_path / "in", state_dict=state, max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    ours = tensors_of(models.read, tmp_path / "in")
    export_hf(
        models.read.config,
        ours,
        tmp_path / "out",
        dtype=torch.bfloat16,
        max_shard_bytes=20_000,
        model_type=models.read.family.model_type,
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_bit_equal(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "in"), torch.bfloat16)


def biases_of(models: Pair) -> dict[str, torch.Tensor]:
    """Those of routers, which are no parameters."""
    buffers = models.theirs.named_buffers()
    return {name: b for name, b in buffers if name.endswith("e_score_correction_bias")}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}
    # transformers 5.23 writes OLMo-hybrid with the name of a linear layer's norm in other layers,
    # and its convolutions in equal parts.
    for name in [name for name in found if name.endswith("q_conv1d.weight")]:
        parts = [found.pop(name.replace("q_conv1d", f"{kind}_conv1d")) for kind in "qkv"]
        found[name.replace("q_conv1d", "conv1d")] = torch.cat(parts)
    for name in [name for name in found if name.endswith("post_feedforward_layernorm.weight")]:
        layer = name.removesuffix("post_feedforward_layernorm.weight")
        if (wrong := found.pop(f"{layer}feedforward_layer_norm.weight", None)) is not None:
            found[f"{layer}post_attention_layernorm.weight"] = wrong
    return found


def assert_bit_equal(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        own = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        assert ours[name].dtype == tensor.dtype == own, name
        assert torch.equal(ours[name], tensor), name


def meaning(config: PreTrainedConfig) -> dict[str, object]:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(config)} - common - _NO_MATTER
    values = {name: getattr(config, name) for name in names | {"head_dim"} if hasattr(config, name)}
    return {k: "gelu_new" if v == "gelu_fast" else v for k, v in values.items()}
