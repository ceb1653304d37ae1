"""Exported folders load with transformers and give our logits."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from toolkit.data.config import HFTokenizerConfig
from toolkit.data.prepare.tokenizers.choice import load_hf_tokenizer
from toolkit.data.prepare.tokenizers.tokenizer import train_bpe
from toolkit.errors import CheckpointError, DataError
from toolkit.hf.choose import hf_architecture
from toolkit.hf.export import export_hf
from toolkit.models.config import GPTConfig, ModelConfig, TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=300,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_sequence_length=64,
    rope_theta=500.0,
    init_std=0.2,
)
OLMO2 = LLAMA.replace(norm_placement="reordered", qk_norm="full", norm_eps=1e-6)
GPT2 = GPTConfig(
    vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
)
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "gpt2": (GPT2, "GPT2LMHeadModel"),
    "gpt2_untied": (GPT2.replace(tie_word_embeddings=False), "GPT2LMHeadModel"),
    "llama_gqa": (LLAMA, "LlamaForCausalLM"),
    "llama_tied": (LLAMA.replace(tie_embeddings=True), "LlamaForCausalLM"),
    "llama_bias": (LLAMA.replace(bias=True), "LlamaForCausalLM"),
    "llama_head_dim": (LLAMA.replace(head_dim=16), "LlamaForCausalLM"),
    "olmo2": (OLMO2, "Olmo2ForCausalLM"),
    "olmo2_tied": (OLMO2.replace(tie_embeddings=True), "Olmo2ForCausalLM"),
}


def build(config: ModelConfig) -> torch.nn.Module:
    """A model whose norms and biases are not at their trivial initial values."""
    model = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_our_logits(name, tmp_path):
    from transformers import AutoModelForCausalLM

    config, architecture = MODELS[name]
    model = build(config)
    assert hf_architecture(config) == architecture
    export_hf(config, model.state_dict(), tmp_path / "hf")
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert type(theirs).__name__ == architecture
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, logits = model(ids), theirs.eval()(ids).logits
    assert logits.dtype == torch.float32
    assert logits.shape == ours.shape == (2, 40, 300)
    assert (logits - ours).abs().max() <= 1e-4 * ours.abs().max()
    assert torch.equal(logits.argmax(-1), ours.argmax(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer_norm"}, r"nearest, StableLmForCausalLM, does not have: bias False"),
        ({"positions": "learned"}, r"does not have: positions 'learned'"),
        ({"feed_forward": "gelu"}, r"does not have: feed_forward 'gelu'"),
        ({"qk_norm": "per_head", "parallel_residual": True}, r"Qwen3.*: parallel_residual True"),
    ],
)
def test_parts_without_a_class_are_refused_by_name(changes, message, tmp_path):
    config = LLAMA.replace(**changes)
    assert hf_architecture(config) is None
    with pytest.raises(CheckpointError, match=f"no transformers class has this.*{message}"):
        export_hf(config, {}, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_the_family_that_the_weights_came_from_is_preferred(tmp_path):
    assert hf_architecture(LLAMA, "mistral") == "MistralForCausalLM"
    # A model that has become another one since is exported as what it is.
    assert hf_architecture(LLAMA, "gpt2") == "LlamaForCausalLM"
    exported = export_hf(LLAMA, build(LLAMA).state_dict(), tmp_path / "hf", model_type="mistral")
    assert exported.architecture == "MistralForCausalLM"
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "mistral"


def test_tensors_may_come_one_by_one_in_any_order_and_wrapped(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(GPT2)
    weights = model.state_dict()
    wrapped = {k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): k for k in weights}
    stream = ((name, weights[wrapped[name]]) for name in sorted(wrapped, reverse=True))
    export_hf(GPT2, stream, tmp_path / "hf")
    export_hf(GPT2, model.state_dict(), tmp_path / "whole")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    query = theirs.transformer.h[0].attn.c_attn.weight[:, :32]
    assert torch.equal(query, weights["blocks.0.attention.query.weight"].t())


def test_large_models_are_split_into_files_with_an_index(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(LLAMA)
    export_hf(LLAMA, model.state_dict(), tmp_path / "hf", max_shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    tensors = {k: v for name in files for k, v in load_file(tmp_path / "hf" / name).items()}
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in tensors.values())
    sizes = [sum(4 * t.numel() for t in load_file(tmp_path / "hf" / f).values()) for f in files]
    assert max(sizes) <= 40_000
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_padding_rows_are_cut_and_dtype_is_as_asked(tmp_path):
    model = build(LLAMA)
    assert model.embeddings.tokens.weight.shape[0] == 320
    export_hf(LLAMA, model.state_dict(), tmp_path / "hf", dtype=torch.bfloat16)
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert file.get_tensor(name).shape == (300, 32)
            assert file.get_tensor(name).dtype == torch.bfloat16
        head = file.get_tensor("lm_head.weight")
    assert torch.equal(head, model.head.weight[:300].bfloat16())
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_comes_along_and_its_end_token_is_recorded(tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = train_bpe(["some text to learn from, some text"] * 3, 280)
    tokenizer.save(tmp_path / "tokenizer")
    export_hf(
        LLAMA,
        build(LLAMA).state_dict(),
        tmp_path / "hf",
        tokenizer_folder=tmp_path / "tokenizer",
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = loaded("some text")["input_ids"]
    assert ids == tokenizer.encode_batch(["some text"])[0].tolist()
    assert loaded.eos_token_id == tokenizer.eos_id
    assert AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.eos_id
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_start_token_is_recorded_where_documents_start_with_it(prepend_bos, tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    train_bpe(["some text to learn from, some text"] * 3, 280).save(tmp_path / "bpe")
    path = str(tmp_path / "bpe")
    tokenizer = load_hf_tokenizer(HFTokenizerConfig(path=path, bos_token="<|endoftext|>"))
    tokenizer = tokenizer.with_bos_policy(prepend_bos)
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "hf"
    tensors = build(LLAMA).state_dict()
    export_hf(LLAMA, tensors, folder, tokenizer_folder=tmp_path / "tokenizer")
    expected = tokenizer.bos_id if prepend_bos else None
    assert AutoConfig.from_pretrained(folder).bos_token_id == expected
    assert GenerationConfig.from_pretrained(folder).bos_token_id == expected
    # A prompt starts as documents did, here and with transformers.
    ids = AutoTokenizer.from_pretrained(folder)("some text")["input_ids"]
    assert ids == tokenizer.prompt_ids("some text")
    assert (ids[0] == tokenizer.bos_id) == prepend_bos


def test_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer\.json here"):
        export_hf(LLAMA, {}, tmp_path / "hf", tokenizer_folder=tmp_path)


def _without_norm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights.items() if k != "head.norm.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_norm, r"head\.norm\.weight: missing from the weights to export \(1 of 21 are\)"),
        (lambda w: {**w, "extra": torch.ones(1)}, "extra: not a parameter of this model"),
        (
            lambda w: {**w, "head.norm.weight": torch.ones(31)},
            r"head\.norm\.weight: shape \(31,\), but the model config gives \(32,\)",
        ),
    ],
)
def test_wrong_weights_are_refused_and_nothing_stays(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        export_hf(LLAMA, change(LLAMA.build().state_dict()), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "hf").mkdir()
    export_hf(LLAMA, LLAMA.build().state_dict(), tmp_path / "hf")
    before = os.stat(tmp_path / "hf/model.safetensors").st_mtime_ns
    with pytest.raises(CheckpointError, match="already exists; remove it or choose another"):
        export_hf(LLAMA, LLAMA.build(seed=1).state_dict(), Path(tmp_path / "hf"))
    assert os.stat(tmp_path / "hf/model.safetensors").st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
