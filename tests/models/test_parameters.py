"""Names and shapes told from a config are those of the model that it builds, in its order."""

from typing import Any

import pytest

from tests.tiny import tiny_model
from toolkit.config import convert
from toolkit.errors import SeveralErrors
from toolkit.models.config import GPTConfig, TransformerConfig
from toolkit.models.init import canonical_parameters
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora import choose_trained
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import parameter_shapes, trained_parameters
from toolkit.models.presets import PRESETS

VARIANTS: dict[str, dict[str, Any]] = {
    "learned positions, biases, tied": {
        "positions": "learned", "norm": "layer_norm", "bias": True, "tie_embeddings": True,
        "feed_forward": "gelu",
    },
    "biases here and there": {"qkv_bias": True, "feed_forward_bias": True, "qk_norm": "per_head"},
    "sandwich": {"norm_placement": "sandwich", "qk_norm": "full", "attention_output_bias": True},
    "experts": {
        "moe": MoEConfig(
            num_experts=4, top_k=2, intermediate_size=8, shared_expert_intermediate_size=16,
            dense_layers=(1,),
        )
    },
}  # fmt: skip


def built(config: Any) -> dict[str, tuple[int, ...]]:
    parameters = canonical_parameters(config.build(init_device="meta"))
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = (
        convert({**PRESETS[name], "num_layers": 3}, TransformerConfig)
        if (PRESETS[name]["type"] == "transformer")
        else convert(PRESETS[name], GPTConfig)
    )
    told = parameter_shapes(config.to_transformer())
    assert list(told.items()) == list(built(config).items())
    assert trained_parameters(config.to_transformer()).num_parameters == config.num_parameters


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("targets", [(), ("*.attention.*",), ("*.query", "*.attention.output")])
def test_variants_with_and_without_adapters(name: str, targets: tuple[str, ...]) -> None:
    config = tiny_model(**VARIANTS[name])
    lora = LoRAConfig(rank=3, target_modules=targets) if targets else None
    model = config.build(init_device="meta")
    chosen = choose_trained(model, lora=lora)
    parameters = canonical_parameters(model)
    assert list(parameter_shapes(config, lora).items()) == [
        (name, tuple(parameter.shape)) for name, parameter in parameters.items()
    ]
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained == {name for name, info in chosen.infos.items() if info.is_trained}
    assert len(trained) == (
        len(parameters) if lora is None else 2 * sum(".lora_A." in name for name in parameters)
    )


def test_what_the_caller_froze_stays_frozen() -> None:
    model = tiny_model().build(init_device="meta")
    model.embeddings.tokens.weight.requires_grad_(False)
    chosen = choose_trained(model)
    assert [n for n, i in chosen.infos.items() if not i.is_trained] == ["embeddings.tokens.weight"]


def test_mistaken_patterns_are_named_together_with_the_nearest_name() -> None:
    lora = LoRAConfig(target_modules=("*.query",), train_also=("head.weigt",))
    with pytest.raises(SeveralErrors) as error:
        trained_parameters(tiny_model(), freeze=("nope", "head.*"), lora=lora)
    names = "embeddings.tokens.weight, blocks.0.attention.query.weight"
    assert [
        str(one).partition(", blocks.0.attention.query.lora")[0] for one in error.value.errors
    ] == [
        "train_module.lora.train_also: 'head.weigt' matches no parameter (did you mean "
        "head.weight?)",
        f"train_module.freeze: 'nope' matches no parameter (names look like {names}",
    ]
