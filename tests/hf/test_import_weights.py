"""Every tensor of theirs is used once and every one of ours is filled, or it is an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.errors import CheckpointError
from toolkit.hf.import_weights import ImportPlan
from toolkit.hf.read_config import read_hf_config
from toolkit.hf.weights import HFWeights

FIELDS: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 9 query heads on 3, in bf16; 70 ids, so 58 rows of padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**FIELDS)).bfloat16().save_pretrained(folder)
    return folder


def changed(original: Path, folder: Path, change: Any, **fields: Any) -> Path:
    """A copy whose tensors `change` was applied to."""
    from transformers import LlamaConfig

    tensors = load_file(original / "model.safetensors")
    change(tensors)
    LlamaConfig(**(FIELDS | fields)).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def imported(folder: Path) -> dict[str, torch.Tensor]:
    model = read_hf_config(folder)
    return dict(ImportPlan(model.family, model.config, HFWeights(folder)).tensors())


def test_all_tensors_come_in_their_type_with_rows_padded(original: Path) -> None:
    source = load_file(original / "model.safetensors")
    model = read_hf_config(original)
    plan = ImportPlan(model.family, model.config, HFWeights(original))
    ours = dict(plan.tensors())
    assert list(ours) == list(plan.meta_tensors)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in plan.meta_tensors.items()
    }
    embedding = ours["embeddings.tokens.weight"]
    assert embedding.shape == (128, 36)
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding[:70], source["model.embed_tokens.weight"])
    assert embedding[70:].count_nonzero() == 0
    key = source["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(ours["blocks.1.attention.key.weight"], key)
    assert len(ours) == len(source)


def test_new_rows_are_the_mean_and_take_padding_first(original: Path) -> None:
    model = read_hf_config(original)
    grown = model.config.replace(vocab_size=73)
    plan = ImportPlan(model.family, grown, HFWeights(original), source_vocab_size=70)
    ours = dict(plan.tensors())
    for name in ("embeddings.tokens.weight", "head.weight"):
        rows = ours[name]
        assert rows.shape == (128, 36)
        mean = rows[:70].float().mean(0).bfloat16()
        assert all(torch.equal(row, mean) for row in rows[70:73])
        assert rows[73:].count_nonzero() == 0


def test_checkpoints_of_the_bare_model_and_buffers_are_understood(
    original: Path, tmp_path: Path
) -> None:
    expected = imported(original)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    bare = imported(changed(original, tmp_path, strip))
    assert bare.keys() == expected.keys()
    assert all(torch.equal(bare[name], expected[name]) for name in bare)


def test_a_tied_head_may_be_repeated_but_not_differ(original: Path, tmp_path: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    equal = changed(original, tmp_path / "equal", repeat, tie_word_embeddings=True)
    assert "head.weight" not in imported(equal)
    other = changed(original, tmp_path / "other", lambda t: None, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        imported(other)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), r"model.norm.weight is missing; config.json asks for it"),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.1" in n],
            r"q_proj.weight, .* and 6 more \(9 tensors\) are missing; config.json asks for them",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(36)}),
            r"q_proj.bias is not in the mapping of llama for this config.json; nothing is dropped",
        ),
        (lambda t: t.update({NORM: torch.ones(35)}), r"has shape \(35,\), .* gives \(36,\)"),
        (lambda t: t.update({NORM: torch.ones(36).byte()}), r"model.norm.weight is of type U8"),
        (
            lambda t: t.update({NORM: torch.ones(36).to(torch.float8_e4m3fn)}),
            r"of type F8_E4M3; weights must be F32, BF16 or F16",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(71, 36)}),
            r"embed_tokens.weight has shape \(71, 36\), but config.json gives \(70, 36\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    original: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        imported(changed(original, tmp_path, change))


def test_more_layers_than_tensors_are_refused_at_once(original: Path, tmp_path: Path) -> None:
    deep = changed(original, tmp_path, lambda _: None, num_hidden_layers=9_000)
    with pytest.raises(CheckpointError, match="21 tensors cannot fill the 9000 layers that"):
        imported(deep)


def test_gpt2_comes_transposed_and_split_from_a_pickle(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=70, n_positions=8, n_embd=24, n_layer=2, n_head=3)
    )
    theirs.config.save_pretrained(tmp_path)
    state = {n.removeprefix("transformer."): t for n, t in theirs.transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = imported(tmp_path)
    fused = state["h.1.attn.c_attn.weight"]
    parts = [ours[f"blocks.1.attention.{p}.weight"] for p in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), fused.t())
    assert torch.equal(ours["blocks.1.feed_forward.up.weight"], state["h.1.mlp.c_fc.weight"].t())
