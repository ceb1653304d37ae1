"""Models of `transformers` give their logits and gradients here, and come back unchanged."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.hf.cases import DENSE
from tests.hf.fidelity import Pair, pair, tensors_of, their_config, to_theirs
from toolkit.hf.family import why_not
from toolkit.hf.read_config import quiet_transformers
from toolkit.models.loss import IGNORE_INDEX

CASES = DENSE
SEQUENCE = 40
"""Longer than every window, and than the original length of scaled ropes."""

_NO_MATTER = {
    # About generation, or dropout, or merged by the config class into other fields.
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "max_window_layers", "original_max_position_embeddings",
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
    theirs = {name: p.grad for name, p in models.theirs.named_parameters()}
    models.theirs.save_pretrained(tmp_path, state_dict=theirs)
    expected = tensors_of(models.read, tmp_path)
    ours = {name: p.grad for name, p in models.ours.named_parameters()}
    models.theirs.zero_grad()
    models.ours.zero_grad()
    assert ours.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        error = float((ours[name] - tensor).abs().max())
        # Keys' biases without rope have no gradient but rounding.
        assert error <= 1e-4 * float(tensor.abs().max()) + 1e-7 * largest, name


@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, "50GB"), (torch.bfloat16, "20KB")], ids=["fp32", "bf16"]
)
def test_tensors_come_back_bit_equal(models, dtype, shard, tmp_path):
    theirs = models.theirs
    state = {name: p.detach().to(dtype) for name, p in theirs.named_parameters()}
    theirs.save_pretrained(tmp_path, state_dict=state, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (dtype == torch.bfloat16)
    saved = {}
    for path in files:
        with safe_open(path, "pt") as file:
            saved |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    family, config, _ = models.read
    back = to_theirs(family, config, tensors_of(models.read, tmp_path).items())
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert back[name].dtype == tensor.dtype == dtype, name
        assert torch.equal(back[name], tensor), name


def test_config_comes_back_equal(models):
    family, config, _ = models.read
    assert why_not(family, config) is None
    written = {"model_type": family.model_type, **family.write_config(config)}
    with quiet_transformers():
        again = CONFIG_MAPPING[family.model_type].from_dict(written)
    assert meaning(again) == meaning(models.theirs.config)


def meaning(config: PreTrainedConfig) -> dict[str, object]:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(config)} - common - _NO_MATTER
    values = {name: getattr(config, name) for name in names | {"head_dim"} if hasattr(config, name)}
    return {k: "gelu_new" if v == "gelu_fast" else v for k, v in values.items()}
