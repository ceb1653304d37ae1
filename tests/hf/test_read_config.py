"""config.json: spellings of all years are understood, and what no mapping covers is named."""

import json

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.hf.cases import DENSE, MOE
from tests.hf.fidelity import their_config
from toolkit.errors import CheckpointError
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Settings
from toolkit.hf.read_config import read_hf_config
from toolkit.models.parameters import parameter_shapes
from toolkit.models.rope_scaling import Llama3RopeConfig, YarnRopeConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
KINDS = ("full_attention", "sliding_attention")
SAID = {"glm4_moe": {"head_dim": 128}}
"""What all released models say, where the defaults of the class make no whole heads."""


def read(folder, **fields):
    (folder / "config.json").write_text(json.dumps(LLAMA | fields))
    return read_hf_config(folder)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_all_fields_of_every_class_are_read(family, tmp_path):
    CONFIG_MAPPING[family.model_type](**SAID.get(family.model_type, {})).save_pretrained(tmp_path)
    assert read_hf_config(tmp_path).family is family


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "num_key_value_heads": 2,
                "torch_dtype": "bfloat16",
            },
            {
                "rope_theta": 500_000.0,
                "rope_scaling": Llama3RopeConfig(
                    factor=8,
                    low_freq_factor=1,
                    high_freq_factor=4,
                    original_max_position_embeddings=32,
                ),
                "num_key_value_heads": 2,
            },
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}},
            {"rope_scaling": YarnRopeConfig(factor=2, original_max_position_embeddings=64)},
        ),
        ({"initializer_range": 0.0}, {"init_std": 0.02, "rope_scaling": None}),
        (
            {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500},
            {"rotary_fraction": 0.5, "rope_theta": 500.0, "parallel_residual": True},
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32},
            {"sliding_window": None, "qkv_bias": True, "bias": False},
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 32,
                "max_window_layers": 1,
            },
            {"sliding_window": 32, "attention_pattern": ("full", "sliding", "sliding")},
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 7, "rope_theta": 300.0},
            {
                "attention_pattern": ("sliding",) * 5 + ("full",),
                "rope_theta": 300.0,
                "sliding_rope_theta": 10_000.0,
                "norm_weight_offset": 1.0,
                "embedding_scale": 32**0.5,
                "attention_scale": 1 / 16,
            },
        ),
        (
            {"model_type": "gemma2"},
            {
                "attention_pattern": ("sliding", "full"),
                "attention_soft_cap": 50.0,
                "logit_soft_cap": 30.0,
                "norm_placement": "sandwich",
                "feed_forward": "geglu",
                "tie_embeddings": True,
            },
        ),
        (
            {
                "model_type": "olmo3",
                "num_hidden_layers": 4,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            {
                "rope_theta": 500_000.0,
                "sliding_rope_theta": 500_000.0,
                "rope_scaling": YarnRopeConfig(factor=4, original_max_position_embeddings=64),
            },
        ),
        (
            # No layer has full attention, so its rope does not matter.
            {"model_type": "olmo3", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            {"rope_scaling": None, "sliding_rope_theta": None, "attention_pattern": ("sliding",)},
        ),
    ],
)
def test_spellings_of_all_years(fields, expected, tmp_path):
    config = read(tmp_path, **fields).config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gptj"}, r"no mapping for model_type 'gptj'; known: .*llama, .*qwen3"),
        ({"model_type": "gptj"}, r"to add one see docs/finetuning\.md#a-new-family"),
        ({"model_type": "x", "auto_map": {}}, r"its own code \(auto_map\), which is never run"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            r"wraps a text model of model_type gemma3_text .*#the-text-part-of-a-multimodal-model",
        ),
        ({"model_type": None}, "model_type is missing; add the one of these"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True is not covered"),
        ({"vocab_size": 100.5}, "Field 'vocab_size' expected int, got float"),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "division or modulo by zero"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_layers must be greater than 0"),
        ({"vocab_size": -3}, "vocab_size must be greater than 0, not -3"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be greater than 0, not nan"),
        ({"rms_norm_eps": float("inf")}, "norm_eps must be greater than 0 and finite, not inf"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not covered by the mapping of llama"),
        ({"dtype": "floaty"}, "no attribute 'floaty'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not cov"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4,
                              "long_factor": [1.0] * 4}},
            "rope_type 'longrope' is not covered by the mapping of llama, which knows default, lin",
        ),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type 'proportional' is not"),
        ({"rope_scaling": {"type": "linear"}}, "'linear'.*factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "Expected `float`, got `str`"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "new": 1}}, "unknown field `new`"),
        ({"rope_scaling": 3}, "rope_parameters"),
        ({"rope_theta": "a"}, r"rope_parameters\.rope_theta 'a' is not a number"),
        ({"rope_theta": float("nan")}, r"rope_theta nan is not a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not covered .* llama"),
        ({"model_type": "gpt_neox", "head_dim": 16}, "head_dim 16 is not covered"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention True"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx Tr"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 3.0}, "softcapping 3.0 is not"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "scalar 0 must be greater than 0"),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
            "'chunked_attention' in layer_types is not covered",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention", *KINDS]},
            "'linear_attention' in layer_types is not covered",
        ),
        (
            {"model_type": "olmo_hybrid", "hidden_act": "gelu_pytorch_tanh"},
            "hidden_act 'gelu_pytorch_tanh' is not covered",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            "layer_types names sliding_attention but sliding_window is null",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"must be one of \['longrope'\], got linear",
        ),
        (
            {"model_type": "olmo3", "num_hidden_layers": 4, "rope_parameters": {
                kind: {"rope_type": "linear", "factor": 2.0 + n} for n, kind in enumerate(KINDS)
            }},
            r"sliding_attention\.rope_type 'linear' is not covered",
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"rope_type": "default", "rope_theta": 5}},
            r"rope_parameters\.rope_t.* is not covered by the mapping of olmo3",
        ),
        (
            {"model_type": "olmo3", "num_hidden_layers": 4,
             "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            r"rope_parameters\.truncate False is not covered",
        ),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_named(fields, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **fields)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ('{"vocab_size": 1', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model_type is missing"),
    ],
)
def test_damaged_files(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(tmp_path)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_hf_config(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        read_hf_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter without its model; .*base_model_name"):
        read_hf_config(tmp_path)


def test_fields_that_transformers_ignores_are_noted(tmp_path):
    extra = {"logit_scale": 0.5, "new_rule": True, "old_rule": False, "top_k": 5, "rope_theta": 7.0}
    note = "logit_scale 0.5, new_rule True of config.json means nothing to the class of transformer"
    (found,) = read(tmp_path, **extra).notes
    assert found.startswith(note)
    (found,) = read(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"}).notes
    assert "own code (auto_map) of config.json means nothing" in found


def test_fields_that_nobody_read_are_named_unless_they_are_off():
    settings = Settings({"model_type": "m", "read": 1, "new": 3, "off": False, "none": None})
    settings.take("read")
    settings.check_all_taken(["read", "off", "none", "absent"])
    with pytest.raises(CheckpointError, match="new 3 is not covered by the mapping of m"):
        settings.check_all_taken(["new"])


def test_dropout_of_the_original_is_noted(tmp_path):
    notes = read(tmp_path, attention_dropout=0.1).notes
    assert notes == ("attention_dropout 0.1 of the original is not used in training",)


def test_transformers_stays_quiet(tmp_path, capfd, recwarn):
    # Its own classes complain about all of these.
    scaling = {"type": "yarn", "factor": 2.0, "finetuned": True, "attention_factor": 2}
    read(tmp_path, rope_scaling=scaling, pad_token_id=-1, torch_dtype="float16")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


@pytest.mark.parametrize("case", DENSE | MOE)
def test_parameters_told_from_the_config_are_those_of_the_model(case, tmp_path):
    model_type, fields = (DENSE | MOE)[case]
    their_config(model_type, **fields).save_pretrained(tmp_path)
    config = read_hf_config(tmp_path).config
    model = config.build(init_device="meta")
    told = parameter_shapes(config.to_transformer())
    assert list(told.items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers 1,000,000,000,000 is larger than any"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers of more than 18 digits is larger"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts 1,000,000,000"),
        (
            {"model_type": "mixtral", "num_local_experts": 99_999, "num_hidden_layers": 9_999},
            "999,890,001 experts in all layers are more than any model has",
        ),
        ({"vocab_size": 10**12}, "vocab_size 1,000,000,000,000 is larger"),
        ({"hidden_size": 10**9}, "hidden_size 1,000,000,000 is larger"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings .* is larger"),
    ],
)
def test_sizes_are_checked_before_anything_is_made_of_them(fields, message, tmp_path):
    base = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 32}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(base | fields))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_hf_config(tmp_path)
