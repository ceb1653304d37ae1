"""Adapters on our linear layers: names, initial values, what is trained, what is refused."""

import math
from typing import Any

import pytest
import torch

from tests.tiny import SEQ, global_batch, tiny_model
from toolkit.errors import ConfigError
from toolkit.hf.adapter import merged
from toolkit.models.architecture import MoEConfig
from toolkit.models.compile import compile_model
from toolkit.models.config import LoRAConfig
from toolkit.models.init import canonical_parameters, initialize_
from toolkit.models.lora import choose_trained
from toolkit.models.parameters import (
    TrainedParameters,
    flops_per_token,
    is_adapter,
    is_trained,
    trained_parameters,
)
from toolkit.models.transformer import Transformer

QUERY = "blocks.0.attention.query"


def adapted(seed: int = 0, **settings: Any) -> Transformer:
    model = tiny_model().build(init_device="meta")
    choose_trained(model, lora=LoRAConfig(**({"rank": 4} | settings)))
    model.to_empty(device="cpu")
    initialize_(model, seed)
    return model


def adapter_of(model: Transformer, *, random: bool = False) -> dict[str, torch.Tensor]:
    found = {n: p.detach() for n, p in canonical_parameters(model).items() if is_adapter(n)}
    if random:
        generator = torch.Generator().manual_seed(1)
        for tensor in found.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return found


def test_names_of_the_base_stay_and_adapters_are_named_after_their_layer() -> None:
    names = list(canonical_parameters(adapted()))
    base = [name for name, _ in tiny_model().build(init_device="meta").named_parameters()]
    assert [name for name in names if not is_adapter(name)] == base
    assert names[names.index(f"{QUERY}.weight") + 1 :][:2] == [
        f"{QUERY}.lora_A.weight",
        f"{QUERY}.lora_B.weight",
    ]
    assert len(names) - len(base) == 2 * 2 * 7  # seven linear layers in each of two blocks


def test_initial_values_depend_on_seed_name_and_shape_alone() -> None:
    whole, part = adapted(seed=5), adapted(seed=5, target_modules=("blocks.0.*.query",))
    plain = tiny_model().build(seed=5)
    ours, few = canonical_parameters(whole), canonical_parameters(part)
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours[name], parameter)
    assert [n for n in few if is_adapter(n)] == [f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"]
    assert torch.equal(few[f"{QUERY}.lora_A.weight"], ours[f"{QUERY}.lora_A.weight"])
    down = torch.cat([p.flatten() for n, p in ours.items() if n.endswith("up.lora_A.weight")])
    # peft's default is uniform within +-1 / sqrt(in); cutting at 3 std takes 1.3% of ours.
    assert down.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)
    assert all(not p.any() for n, p in ours.items() if n.endswith("lora_B.weight"))
    ids = global_batch(0)
    assert torch.equal(whole(ids), plain(ids))


def test_an_adapted_model_is_the_merged_one() -> None:
    model, plain = adapted(alpha=6.0), tiny_model().build()
    adapter = adapter_of(model, random=True)
    before = plain(global_batch(0))
    settings = LoRAConfig(rank=4, alpha=6.0)
    plain.load_state_dict(dict(merged(plain.state_dict().items(), adapter, settings)))
    ours, whole = model(global_batch(0)), plain(global_batch(0))
    assert (ours - whole).abs().max() < 1e-5 * whole.abs().max()
    assert (before - whole).abs().max() > 0.1 * whole.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(global_batch(0))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - whole).abs().max() < 0.05 * whole.abs().max()


def test_gradients_reach_adapters_and_what_is_trained_besides_alone() -> None:
    model = adapted(train_also=("head.*",))
    adapter_of(model, random=True)
    ids = global_batch(0)
    model(ids, ids).loss.backward()
    settings = LoRAConfig(train_also=("head.*",))
    for name, parameter in canonical_parameters(model).items():
        assert (parameter.grad is not None) == is_trained(name, settings), name
    assert is_trained("head.norm.weight", settings)
    assert not is_trained(f"{QUERY}.weight", settings)


def test_blocks_with_adapters_compile_as_one_graph() -> None:
    model = adapted()
    adapter_of(model, random=True)
    ids = global_batch(0)
    expected = model(ids, ids).loss
    compile_model(model, fullgraph=True, backend="eager")
    loss = model(ids, ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ("*.atention.*",)},
            r"target_modules: '\*\.atention\.\*' matches no linear layer \(names look like "
            r"blocks\.0\.attention\.query",
        ),
        (
            {"target_modules": ("*.query", "embeddings.tokens")},
            r"'embeddings\.tokens' matches no linear layer \(embeddings\.tokens\.weight is none; "
            r"train_module\.lora\.train_also trains it whole\)",
        ),
        ({"target_modules": ("head.weight",)}, r"'head\.weight' matches no linear layer \(head"),
        ({"train_also": ("head.bias",)}, r"train_also: 'head\.bias' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(**settings)


def test_experts_take_no_adapter() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
    model = tiny_model(moe=moe).build(init_device="meta")
    with pytest.raises(ConfigError, match=r"matches blocks\.0\.feed_forward\.exp"):
        choose_trained(model, lora=LoRAConfig())
    choose_trained(model, lora=LoRAConfig(target_modules=("*.attention.*",)))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("blocks.*", "hed.*"), r"train_module\.freeze: 'hed\.\*' matches no parameter \(names"),
        (("*",), r"train_module\.freeze: \* leaves no parameter to train"),
    ],
)
def test_what_cannot_be_frozen_is_named(freeze: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_trained(tiny_model().build(init_device="meta"), freeze=freeze)


def test_freezing_takes_adapters_too_and_counts_are_shown() -> None:
    model = tiny_model().build(init_device="meta")
    lora = LoRAConfig(rank=2, target_modules=("*.query",))
    chosen = choose_trained(model, lora=lora, freeze=("blocks.0.*",))
    # One adapter is left, 2 x (32 + 32), of 27,856 - 5 layers' and one of two of rank 2.
    assert chosen.num_trained == 2 * 64
    assert chosen.num_parameters == tiny_model().num_parameters + 2 * 2 * 64
    assert str(chosen).startswith("128 of ")


MATRICES = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 50
"""Weights of the matrices of one block."""
HEAD = 100 * 32
ATTENTION = 12 * 32 * (SEQ + 1) // 2
"""FLOPs of one block's attention, forward and backward, a token."""


def chosen(**settings: Any) -> TrainedParameters:
    return choose_trained(tiny_model().build(init_device="meta"), **settings)


def test_flops_count_what_frozen_parameters_save() -> None:
    config = tiny_model()
    full = 6 * (2 * MATRICES + HEAD) + 2 * ATTENTION
    everything = trained_parameters(config)
    assert flops_per_token(config, everything, SEQ) == config.flops_per_token(SEQ) == full
    only_head = chosen(freeze=("blocks.*", "embeddings.*"))
    forward_only = 2 * 2 * MATRICES + 2 * ATTENTION // 3
    assert flops_per_token(config, only_head, SEQ) == forward_only + 6 * HEAD
    upper = chosen(freeze=("blocks.0.*", "embeddings.*", "head.weight"))
    expected = 2 * MATRICES + ATTENTION // 3 + 6 * MATRICES + ATTENTION + 4 * HEAD
    assert flops_per_token(config, upper, SEQ) == expected
    low_rank = chosen(lora=LoRAConfig(rank=4, target_modules=("*.query",)))
    expected = 4 * (2 * MATRICES + HEAD) + 2 * ATTENTION + 6 * 2 * 4 * (32 + 32)
    assert flops_per_token(config, low_rank, SEQ) == expected
