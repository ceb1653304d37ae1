"""Adapters on our linear layers: names, initial values, what is trained, what is refused."""

import math
from typing import Any

import pytest
import torch

from tests.tiny import SEQ, global_batch, tiny_model
from toolkit.distributed.activations import apply_activation_checkpointing
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.errors import ConfigError
from toolkit.hf.adapter import merged
from toolkit.models.adapter_state import AdapterState, TokenDropout, dropout_keys
from toolkit.models.compile import compile_model
from toolkit.models.init import canonical_parameters, initialize_
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora import adapters_off, choose_trained
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import (
    TrainedParameters,
    flops_per_token,
    is_adapter,
    is_trained,
    parameter_shapes,
    quantised_layers,
    trained_parameters,
)
from toolkit.models.transformer import Transformer

QUERY = "blocks.0.attention.query"
LORA = LoRAConfig(rank=4)
MOE = {"moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=8)}


def adapted(lora: LoRAConfig, seed: int = 0, **changes: Any) -> Transformer:
    model = tiny_model(**changes).build(init_device="meta")
    choose_trained(model, lora=lora)
    model.to_empty(device="cpu")
    initialize_(model, seed)
    return model


def adapter_of(model: Transformer, *, random: bool = False) -> dict[str, torch.Tensor]:
    found = {n: p.detach() for n, p in canonical_parameters(model).items() if is_adapter(n)}
    if random:
        generator = torch.Generator().manual_seed(1)
        for tensor in found.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return found


def test_names_of_the_base_stay_and_adapters_are_named_after_their_layer() -> None:
    names = list(canonical_parameters(adapted(LORA)))
    base = [name for name, _ in tiny_model().build(init_device="meta").named_parameters()]
    assert [name for name in names if not is_adapter(name)] == base
    assert names[names.index(f"{QUERY}.weight") + 1 :][:2] == [
        f"{QUERY}.lora_A.weight",
        f"{QUERY}.lora_B.weight",
    ]
    assert len(names) - len(base) == 2 * 2 * 7  # seven linear layers in each of two blocks


def test_initial_values_depend_on_seed_name_and_shape_alone() -> None:
    some = LORA.replace(target_modules=("blocks.0.*.query",))
    whole, part = adapted(LORA, seed=5), adapted(some, seed=5)
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


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"alpha": 6.0}, {}),
        ({"rslora": True}, {}),
        ({"dora": True, "rslora": True}, {"bias": True}),
        ({"target_modules": ("*.query", "embeddings.tokens")}, {"tie_embeddings": True}),
        ({"trainable_tokens": (7, 99, 2)}, {}),
        ({"trainable_tokens": (7, 2), "target_modules": ()}, {"tie_embeddings": True}),
        ({}, MOE),
    ],
)
def test_an_adapted_model_is_the_merged_one(
    settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    lora, plain = LoRAConfig(**({"rank": 4} | settings)), tiny_model(**changes).build()
    model = adapted(lora, **changes)
    before = plain(global_batch(0))
    begun = model(global_batch(0))
    assert (begun - before).abs().max() <= 1e-6 * before.abs().max()  # as nothing but the base
    adapter = adapter_of(model, random=True)
    plain.load_state_dict(dict(merged(plain.state_dict().items(), adapter, lora)))
    ours, whole = model(global_batch(0)), plain(global_batch(0))
    assert (ours - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert (before - whole).abs().max() > 0.1 * whole.abs().max()
    with adapters_off(model):
        assert torch.equal(model(global_batch(0)), before)
    assert torch.equal(model(global_batch(0)), ours)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(global_batch(0))
    assert rounded.dtype == torch.bfloat16
    if not changes.get("moe"):  # rounding changes the choice of experts
        assert (rounded - whole).abs().mean() < 0.01 * whole.abs().max()


def test_other_rows_than_those_of_trained_tokens_stay() -> None:
    lora = LoRAConfig(trainable_tokens=(7, 99), target_modules=())
    for is_tied in (False, True):
        model, before = adapted(lora, tie_embeddings=is_tied), tiny_model().build().state_dict()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = global_batch(0)
        model(ids, ids).loss.backward()
        optimizer.step()
        after = dict(merged(before.items(), adapter_of(model), lora)) if not is_tied else {}
        tables = ["embeddings.tokens.weight"] + ["head.weight"] * (not is_tied)
        own = canonical_parameters(model)
        assert [n for n, p in own.items() if p.requires_grad] == [
            n.replace("weight", "token_rows.weight") for n in tables
        ]
        for name in tables if after else ():
            changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
            assert changed == [7, 99]


def test_dropout_depends_on_the_token_and_the_layer_alone() -> None:
    state = AdapterState()
    drop, other = (TokenDropout(0.25, name, state) for name in (QUERY, "blocks.1.attention.query"))
    x = torch.ones(4, 64, 512)
    assert drop(x) is x  # outside of training
    state.keys = dropout_keys(1, 5, range(4), 64)
    whole = drop(x)
    kept = whole != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert whole[kept].unique().tolist() == [pytest.approx(4 / 3)]
    for part in (kept.float().mean((0, 1)), kept.float().mean((0, 2)), kept.float().mean((1, 2))):
        assert (part - 0.75).abs().max() < 0.15
    state.keys = dropout_keys(1, 5, range(2, 4), 64)
    assert torch.equal(drop(x[2:]), whole[2:])  # another rank's rows, or another microbatch
    drop.first_channel = 100
    assert torch.equal(drop(x[2:, :, 100:]), whole[2:, :, 100:])  # its share of the channels
    drop.first_channel = 0
    others = [other(x[2:])]
    for seed, step, rows in ((2, 5, range(2, 4)), (1, 6, range(2, 4)), (1, 5, range(2))):
        state.keys = dropout_keys(seed, step, rows, 64)
        others.append(drop(x[2:]))
    for one in others:  # independent: alike as often as chance has it
        alike = ((one != 0) == kept[2:]).float().mean().item()
        assert alike == pytest.approx(0.75**2 + 0.25**2, abs=0.01)


def test_dropout_is_the_same_where_blocks_are_computed_again_or_compiled() -> None:
    lora = LoRAConfig(rank=4, dropout=0.5, dora=True)
    ids, results = global_batch(0), list[list[Any]]()
    keys = dropout_keys(0, 1, range(len(ids)), ids.shape[1])
    for change in ("", "recomputed", "compiled", "off"):
        model = adapted(lora, num_layers=1)
        adapter_of(model, random=True)
        if change == "recomputed":
            config = ActivationCheckpointingConfig(mode="full")
            apply_activation_checkpointing(model.blocks, config)
        if change == "compiled":
            compile_model(model, fullgraph=True, backend="eager")
        model(ids, ids, dropout_keys=None if change == "off" else keys).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    plain, recomputed, compiled, off = results
    assert all(map(torch.equal, recomputed, plain))
    for got, want in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not any(map(torch.equal, off, plain))


def test_gradients_reach_adapters_and_what_is_trained_besides_alone() -> None:
    settings = LORA.replace(train_also=("head.*",))
    model = adapted(settings)
    adapter_of(model, random=True)
    ids = global_batch(0)
    model(ids, ids).loss.backward()
    for name, parameter in canonical_parameters(model).items():
        assert (parameter.grad is not None) == is_trained(name, settings), name
    assert is_trained("head.norm.weight", settings)
    assert not is_trained(f"{QUERY}.weight", settings)


def test_blocks_with_adapters_compile_as_one_graph() -> None:
    model = adapted(LORA)
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
            {"target_modules": ("*.query", "head.norm")},
            r"'head\.norm' matches no linear layer \(head\.norm\.weight is none; "
            r"train_module\.lora\.train_also trains it whole\)",
        ),
        ({"target_modules": ("head.weight",)}, r"'head\.weight' matches no linear layer \(head"),
        ({"train_also": ("head.bias",)}, r"train_also: 'head\.bias' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(LORA.replace(**settings))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (
            {"rank": 64, "target_modules": ("*.attention.*",)},
            {},
            r"rank: 64 is more than blocks\.0\.attention\.key has \(16 x 32\); use at most 16, or ",
        ),
        ({"dora": True}, MOE, r"dora: does not go with adapters on experts \(blocks\.0\.feed_fo"),
        ({"dropout": 0.1}, MOE, r"dropout: 0\.1 does not go with adapters on experts \(blocks"),
        (
            {"dora": True, "target_modules": ("*.query", "embeddings.tokens")},
            {},
            r"dora: is for linear layers; leave embeddings\.tokens out of target_modules",
        ),
        (
            {"trainable_tokens": (3, 100)},
            {},
            r"trainable_tokens: 100 is no token of the model; its ids are 0 to 99",
        ),
        (
            {"trainable_tokens": (3,), "train_also": ("embed*",)},
            {},
            r"trainable_tokens: embeddings\.tokens\.weight is trained whole \(train_also\); leave",
        ),
        (
            {"trainable_tokens": (3,), "target_modules": ("embeddings.tokens",)},
            {},
            r"trainable_tokens: does not go with an adapter on embeddings\.tokens; leave one",
        ),
        (
            {"quantize_base": "nf4", "target_modules": ("*.experts.*",)},
            MOE,
            r"quantize_base: is for linear layers, and none has an adapter; leave it out",
        ),
    ],
)
def test_what_no_adapter_can_be_is_said_in_one_line(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    config, lora = tiny_model(**changes), LoRAConfig(**({"rank": 4} | settings))
    check = quantised_layers if lora.quantize_base else parameter_shapes
    with pytest.raises(ConfigError, match=message) as error:
        check(config, lora)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dora": True, "quantize_base": "int8"},
            "dora: needs the weights that quantize_base int8",
        ),
        ({"dropout": 1.0}, "dropout: 1.0 is no share"),
        ({"trainable_tokens": (3, 3)}, "trainable_tokens: 3 is named twice"),
        ({"target_modules": ()}, "target_modules: empty; name the layers"),
    ],
)
def test_what_no_model_has_is_refused_by_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


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


def test_a_score_takes_the_place_of_the_bases_head() -> None:
    base = {"blocks.0.attention.query.weight": torch.ones(2, 2), "head.weight": torch.ones(9, 2)}
    score = torch.full((1, 2), 3.0)
    lora = LoRAConfig(rank=1, train_also=("head.score.weight",))
    found = dict(merged(base.items(), {"head.score.weight": score}, lora))
    assert found.keys() == {"blocks.0.attention.query.weight", "head.score.weight"}
    assert found["head.score.weight"] is score
