"""Reward models leave as `...ForSequenceClassification`, give equal scores there, and come back."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from tests.hf.test_source import save
from tests.tiny import tiny_model
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer, train_bpe
from toolkit.errors import CheckpointError
from toolkit.hf.choose import choose_family
from toolkit.hf.compare import compare_with_transformers
from toolkit.hf.export import export_hf, export_source
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Family
from toolkit.hf.model_card import ModelCard, render_card, scoring_of
from toolkit.hf.read_config import read_hf_config
from toolkit.hf.source import find_source, source_tensors
from toolkit.hf.tokenizer_files import convert_tokenizer
from toolkit.models.config import GPTConfig, ModelConfig, TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.train.adapter_base import describe_base

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


@pytest.mark.parametrize(
    ("base", "whole"),
    [
        (tiny_model(vocab_multiple=1), True),
        (tiny_model(vocab_multiple=1, tie_embeddings=True), True),
        (tiny_model(vocab_multiple=1, num_scores=1), False),
    ],
    ids=["language model", "tied", "scored"],
)
def test_an_adapter_is_merged_into_a_language_model_or_a_scored_one(
    tmp_path: Path, base: TransformerConfig, whole: bool
) -> None:
    lora = LoRAConfig(rank=2, alpha=4.0, train_also=("head.score.weight",) if whole else ())
    stored = save(tmp_path / "base", 0, base.build(seed=1))
    layer, width = "blocks.0.attention.query", base.d_model
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, width)}
    tensors[f"{layer}.lora_B.weight"] = torch.randn(width, 2)
    if whole:
        tensors["head.score.weight"] = torch.randn(1, width)
    scored = base.replace(num_scores=1).build(init_device="meta")
    record = msgspec.to_builtins(describe_base(stored))
    adapter = {"adapter": msgspec.to_builtins(lora), "base": record}
    source = find_source(save(tmp_path / "tuned", 3, scored, tensors=tensors, **adapter))
    merged = export_source(source, tmp_path / "merged", merge_adapter=True, check=True)
    assert (merged.not_checked, merged.gives_scores) == (None, True)
    if whole:
        with pytest.raises(CheckpointError, match="export the merged model instead"):
            export_source(source, tmp_path / "alone", check=True)
    else:
        alone = export_source(source, tmp_path / "alone", check=True)
        assert (alone.not_checked, alone.gives_scores) == (None, True)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_families_know_whether_there_is_a_class_for_scores(family: Family) -> None:
    scored = family.class_of(tiny_model(num_scores=1))
    assert family.can_score == (scored in dir(transformers))


@pytest.mark.parametrize(("controls", "pad"), [(["<|user|>", "<|pad|>"], "<|pad|>"), ([], None)])
def test_batches_are_scored_as_the_card_shows(
    tmp_path: Path, controls: list[str], pad: str | None
) -> None:
    learned = train_bpe(["a text to learn from"], 270)
    learned.save(tmp_path / "first")
    template = "{% for m in messages %}{{ m.content }}; {% endfor %}"
    tokens = tmp_path / "tokens"
    convert_tokenizer(tmp_path / "first", tokens, add_tokens=controls, chat_template=template)
    file = tokens / "tokenizer_config.json"  # as many models have it, which would drop the end
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": learned.eos_token}))
    tokenizer = load_tokenizer(tokens)
    config = tiny_model(num_scores=1, vocab_size=tokenizer.vocab_size, max_sequence_length=64)
    model = config.build(seed=3)
    weights = dict(model.named_parameters())
    scoring = scoring_of(tokenizer, None, config.vocab_size, append_eos=True)
    table = {"Architecture": "LlamaForSequenceClassification"}
    card = ModelCard(
        title="m", model=table, has_tokenizer=True, has_chat_template=True, scoring=scoring
    )
    export_hf(config, weights, tmp_path / "out", tokenizer_folder=tokens)
    code = render_card(card).split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/folder", str(tmp_path / "out"))
    code = code.replace("[text, text]", "[text, 'much longer: ' + text]")
    found: dict[str, Any] = {}
    exec(code, found)
    text = "Hello; Hello, how can I help?; "
    scores = []
    for one in (text, f"much longer: {text}") if pad else (text,):
        ids = [*tokenizer.encode_batch([one])[0].tolist(), tokenizer.eos_id]
        scores.append(model(torch.tensor([ids]))[0, -1, 0].item())
    with torch.no_grad():
        theirs = found["model"](**found["inputs"]).logits[:, 0].tolist()
    assert theirs == pytest.approx(scores, abs=1e-5)
    assert found["tokenizer"].pad_token == pad


def test_a_family_without_the_class_is_refused(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, normalize_top_k=False)
    config = tiny_model(num_scores=1, qk_norm="full", num_key_value_heads=4, moe=moe)
    with pytest.raises(CheckpointError, match="no transformers class"):
        export_hf(config, dict(config.build().named_parameters()), tmp_path / "out")
