"""Adapters out: PEFT loads them onto the original model, and merging gives the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.hf.cases import DENSE, MOE
from tests.hf.fidelity import Pair, pair, their_config
from toolkit.errors import CheckpointError
from toolkit.hf.adapter import NotForPeftError, export_adapter, merged
from toolkit.hf.export import export_hf
from toolkit.hf.loading import load_causal_lm
from toolkit.hf.loading import with_adapter as load_adapter
from toolkit.models.init import canonical_parameters
from toolkit.models.lora import choose_trained
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import is_adapter
from toolkit.models.transformer import Transformer

TARGETS = {
    "all": ("*.attention.*", "*.feed_forward.*"),
    "some": ("*.query", "*.value", "blocks.1.attention.output", "*.up"),
}
RANK, ALPHA = 3, 4.5
FUSED = {
    "llama": {"self_attn.q_proj": (1, 1)},
    "gpt2": {"attn.c_attn": (3, 2), "mlp.c_fc": (1, 1)},
    "phi3": {"self_attn.qkv_proj": (3, 2), "mlp.gate_up_proj": (2, 1)},
    "gpt_neox": {"attention.query_key_value": (3, 2)},
}
"""Their layers, and on how many of ours that they hold the two sets of targets put adapters."""


@pytest.fixture(scope="module", params=FUSED)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """`gpt_neox` interleaves query, key and value head by head; Conv1D of `gpt2` is transposed."""
    model_type, fields = DENSE[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return pair(their_config(model_type, **fields), folder)


def with_adapter(plain: Transformer, lora: LoRAConfig, scale: float = 1.0) -> Transformer:
    """A model with the weights of `plain` and a random adapter."""
    model = plain.config.build(init_device="meta")
    choose_trained(model, lora=lora)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    weights = plain.state_dict()
    for name, parameter in canonical_parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".lora_magnitude"):
            weight = weights[f"{name.removesuffix('.lora_magnitude')}.weight"]
            value = weight.norm(dim=1) * (1 + 0.2 * noise)
        else:
            value = noise * (scale if ".lora_" in name else 1.0) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value if is_adapter(name) else weights[name])
    return model.eval()


def adapter_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in canonical_parameters(model).items() if is_adapter(n)}


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_peft_loads_it_onto_the_original(models: Pair, tmp_path: Path, targets: str) -> None:
    config = models.read.config
    lora = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=TARGETS[targets])
    model = with_adapter(models.ours, lora)
    adapter, folder = adapter_of(model), tmp_path / "adapter"
    export_adapter(config, models.read.family, lora, adapter, folder, str(models.folder))
    ids = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = model(ids)
    original = AutoModelForCausalLM.from_pretrained(models.folder, attn_implementation="eager")
    before = original(ids).logits
    theirs = PeftModel.from_pretrained(original, folder).eval()
    assert_same(theirs(ids).logits, ours)
    assert (ours - before).abs().max() > 0.1 * before.abs().max()

    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(models.folder)
    assert settings["fan_in_fan_out"] == (models.read.family.model_type == "gpt2")
    for layer, counts in FUSED[models.read.family.model_type].items():
        count = counts[list(TARGETS).index(targets)]
        name = next(n for n in settings["target_modules"] if n.endswith(layer))
        assert settings["rank_pattern"].get(name, RANK) == count * RANK
        assert settings["alpha_pattern"].get(name, ALPHA) == count * ALPHA

    whole = dict(merged(models.ours.state_dict().items(), adapter, lora))
    export_hf(config, whole, tmp_path / "merged", model_type=models.read.family.model_type)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert_same(loaded(ids).logits, ours)


LAYERS, ATTENTION = ("*.attention.*", "*.feed_forward.*"), ("*.attention.*",)
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "target_modules": ("*.query", "*.value", "*.up")},
    "dora": {"dora": True, "target_modules": LAYERS},
    "embeddings": {"target_modules": (*ATTENTION, "embeddings.tokens")},
    "tokens": {"target_modules": ATTENTION, "trainable_tokens": (100, 3, 7)},
    "tokens alone": {"target_modules": (), "trainable_tokens": (100, 3, 7)},
    "all layers": {"rslora": True, "target_modules": LAYERS},
    "experts here and there": {"target_modules": ("blocks.0.feed_forward.experts.gate",)},
}
CASES = {
    "llama": ("rslora", "dora", "embeddings", "tokens", "tokens alone"),
    "gemma3": ("embeddings", "tokens", "tokens alone"),
    "gpt2": ("dora", "tokens"),
    "phi3": ("dora", "rslora"),
    "mixtral": ("all layers", "experts here and there", "embeddings"),
    "qwen3_moe": ("all layers",),
    "olmoe": ("all layers",),
}


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_every_kind_gives_our_logits_in_peft_and_merged(tmp_path: Path, family: str) -> None:
    model_type, fields = (DENSE | MOE)[family]
    both = pair(their_config(model_type, **fields), tmp_path / "base")
    config, choice = both.read.config, both.read.family
    ids = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, ::5] = 100
    before = both.ours(ids)
    for kind in CASES[family]:
        lora = LoRAConfig(rank=RANK, alpha=ALPHA, **KINDS[kind])
        model, place = with_adapter(both.ours, lora, scale=0.3), tmp_path / kind
        ours, adapter = model(ids), adapter_of(model)
        assert (ours - before).abs().max() > 0.1 * before.abs().max()
        export_adapter(config, choice, lora, adapter, place / "adapter")
        with_peft = load_adapter(
            load_causal_lm(both.folder, dtype=torch.float32, plain_attention=True),
            place / "adapter",
        )
        whole = merged(both.ours.state_dict().items(), adapter, lora)
        export_hf(config, whole, place / "merged", model_type=model_type)
        loaded = load_causal_lm(place / "merged", dtype=torch.float32, plain_attention=True)
        for theirs in (with_peft, loaded):
            error = (theirs(ids).logits - ours).abs().max() / ours.abs().max()
            assert error < 1.5e-6, (kind, error)


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("gpt2", "embeddings", r"transformer\.wte: peft adapts no head that is tied"),
        ("phi3", "dora of some", r"query: DoRA on a part of model\.layers\.0\.self_attn\.qkv"),
        (
            "qwen3_moe_some_dense_biases_windows",
            "all layers",
            r"model\.layers\.0\.mlp\.gate_proj: beside layers with experts, peft has no place",
        ),
    ],
)
def test_what_peft_cannot_hold_is_refused(
    tmp_path: Path, family: str, kind: str, message: str
) -> None:
    model_type, fields = (DENSE | MOE)[family]
    both = pair(their_config(model_type, **fields), tmp_path / "base")
    kinds = KINDS | {"dora of some": {"dora": True, "target_modules": ("*.query",)}}
    lora = LoRAConfig(rank=RANK, **kinds[kind])
    adapter = adapter_of(with_adapter(both.ours, lora))
    with pytest.raises(NotForPeftError, match=message) as error:
        export_adapter(both.read.config, both.read.family, lora, adapter, tmp_path / "adapter")
    assert str(error.value).endswith(
        "; export the merged model instead: toolkit export-hf --merge-adapter"
    )
    assert not (tmp_path / "adapter").exists()


LLAMA = LoRAConfig(rank=2, alpha=2.0)
LAYER = "blocks.0.attention.query"
DOWN, UP = torch.eye(2, 4), torch.ones(6, 2)
ADAPTER = {f"{LAYER}.lora_A.weight": DOWN, f"{LAYER}.lora_B.weight": UP}


def test_merging_streams_and_keeps_what_has_no_adapter() -> None:
    base = {
        f"{LAYER}.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
        f"{LAYER}.bias": torch.zeros(6, dtype=torch.bfloat16),
        "head.weight": torch.zeros(3),
    }
    whole = ADAPTER | {"head.weight": torch.ones(3)}
    stream = merged(iter(base.items()), whole, LLAMA)
    name, first = next(stream)
    assert (name, first.dtype) == (f"{LAYER}.weight", torch.float32)
    assert first.sum() == 12  # two columns of ones
    rest = dict(stream)
    assert rest[f"{LAYER}.bias"].dtype == torch.bfloat16
    assert rest["head.weight"].sum() == 3


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"head.weight": torch.zeros(3)}, r"query\.lora_A\.weight: the base has no weight for it"),
        ({f"{LAYER}.weight": torch.zeros(6, 5)}, r"adapter is for shape \(6, 4\), the base has"),
    ],
)
def test_a_base_of_another_model_is_refused(base: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        dict(merged(base.items(), ADAPTER, LLAMA))


def test_what_is_no_adapter_is_not_exported_as_one(models: Pair, tmp_path: Path) -> None:
    config, family = models.read.config, models.read.family
    lora = LoRAConfig(rank=RANK)
    adapter = adapter_of(with_adapter(models.ours, lora))
    target = tmp_path / "adapter"
    whole = adapter | {"head.norm.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"head\.norm\.weight: trained whole .*--merge-adap"):
        export_adapter(config, family, lora, whole, target)
    unknown = adapter | {"blocks.9.attention.query.lora_A.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"blocks\.9\.attention\.query: the transformers"):
        export_adapter(config, family, lora, unknown, target)
    assert not target.exists()
    target.mkdir()
    (target / "x").touch()
    with pytest.raises(CheckpointError, match="already exists; remove it"):
        export_adapter(config, family, lora, adapter, target)
