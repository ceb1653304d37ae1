"""Initial values depend on (seed, name, shape) and on nothing else."""

import math

import numpy as np
import pytest
import torch

from toolkit.models import init
from toolkit.models.config import GPTConfig, TransformerConfig
from toolkit.models.init import InitSpec, canonical_name, fill_flat_, init_spec, initialize_

CONFIG = TransformerConfig(
    vocab_size=500,
    d_model=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=96,
    max_sequence_length=32,
    qk_norm="full",
)


def draw(start: int, length: int, numel: int, *, name: str = "w", seed: int = 0) -> torch.Tensor:
    spec = InitSpec("normal", 0.02)
    out = torch.empty(length)
    return fill_flat_(out, name=name, numel=numel, start=start, spec=spec, seed=seed)


def test_any_slice_equals_the_same_slice_of_the_whole(monkeypatch):
    monkeypatch.setattr(init, "BLOCK_SIZE", 64)
    whole = draw(0, 1000, 1000)
    for start, length in [(0, 1), (63, 2), (64, 64), (100, 500), (990, 10), (5, 0)]:
        assert torch.equal(draw(start, length, 1000), whole[start : start + length])


def test_seed_and_name_and_block_change_the_values(monkeypatch):
    monkeypatch.setattr(init, "BLOCK_SIZE", 64)
    whole = draw(0, 128, 128)
    assert not torch.equal(whole[:64], whole[64:])
    assert not torch.equal(whole, draw(0, 128, 128, seed=1))
    assert not torch.equal(whole, draw(0, 128, 128, name="v"))


def test_values_are_those_of_the_first_release():
    # Changing them silently would change every run that is repeated from its config.
    expected = [0.016576948, -0.001517851, 0.003701918]
    assert draw(0, 3, 3).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_longer_parameter_begins_with_the_values_of_a_shorter_one():
    assert torch.equal(draw(0, 50_000, 100_000), draw(0, 50_000, 50_000))


def test_normal_is_cut_at_three_standard_deviations():
    values = draw(0, 200_000, 200_000)
    assert values.abs().max() <= 0.06
    # A normal distribution cut at 3 has standard deviation 0.98658.
    assert values.std().item() == pytest.approx(0.02 * 0.98658, rel=5e-3)
    assert abs(values.mean().item()) < 2e-4


def test_threads_and_dtype_do_not_change_the_draw():
    threads = torch.get_num_threads()
    one = draw(0, 100_000, 100_000)
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(one, draw(0, 100_000, 100_000))
    finally:
        torch.set_num_threads(threads)
    low = torch.empty(100, dtype=torch.bfloat16)
    fill_flat_(low, name="w", numel=100_000, start=0, spec=InitSpec("normal", 0.02), seed=0)
    assert torch.equal(low, one[:100].bfloat16())


def test_range_outside_the_parameter_is_refused():
    with pytest.raises(ValueError, match="w: elements 90 to 110 of 100 asked for"):
        draw(90, 20, 100)


def test_every_parameter_has_a_spec_and_residual_outputs_are_scaled():
    model = GPTConfig(vocab_size=100, n_embd=32, n_layer=8, n_head=4).build(init_device="meta")
    specs = init_spec(model)
    assert set(specs) == {name for name, _ in model.named_parameters()}
    assert specs["blocks.3.attention_norm.weight"] == InitSpec("ones")
    assert specs["blocks.3.attention.query.bias"] == InitSpec("zeros")
    assert specs["blocks.3.attention.query.weight"] == InitSpec("normal", 0.02)
    for name in ("attention.output", "feed_forward.down"):
        assert specs[f"blocks.3.{name}.weight"] == InitSpec("normal", 0.02 / 4)
    assert init_spec(CONFIG.build(init_device="meta"))["blocks.0.feed_forward.down.weight"].std == (
        0.02
    )


@pytest.mark.parametrize("offset", [1.0, 0.25])
def test_norms_with_an_offset_multiply_by_one_at_first(offset):
    model = CONFIG.replace(norm_weight_offset=offset, norm_placement="sandwich").build()
    names = [name for name, _ in model.named_parameters() if "norm" in name]
    assert len(names) == 2 * (4 + 2) + 1
    for name in names:
        assert model.get_parameter(name).unique().tolist() == [1.0 - offset], name
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    plain = CONFIG.build().head.norm
    torch.testing.assert_close(model.head.norm(x), plain(x))


def test_wrappers_do_not_change_names():
    assert canonical_name("module.blocks.0._checkpoint_wrapped_module.attention.query.weight") == (
        "blocks.0.attention.query.weight"
    )
    assert canonical_name("_orig_mod.head.weight") == "head.weight"


def test_meta_build_then_materialise_equals_direct_build():
    direct = CONFIG.build(seed=7).state_dict()
    late = CONFIG.build(init_device="meta")
    assert all(p.is_meta for p in late.parameters())
    assert not list(late.buffers())
    late.to_empty(device="cpu")
    initialize_(late, 7)
    assert all(torch.equal(value, direct[name]) for name, value in late.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_fresh_model_predicts_nearly_uniformly(tied):
    model = CONFIG.replace(tie_embeddings=tied).build()
    ids = torch.randint(500, (4, 33), generator=torch.Generator().manual_seed(0))
    sums = model(ids[:, :-1], ids[:, 1:])
    assert sums.ce.item() / 128 == pytest.approx(math.log(500), abs=0.1)


def test_the_largest_seed_is_one_everywhere() -> None:
    from toolkit.data.order.stream import KeyedPermutation
    from toolkit.distributed.environment import _seed_everything

    seed = 2**64 - 1
    _seed_everything(seed)
    assert torch.initial_seed() == seed
    torch.Generator().manual_seed(seed)
    order = KeyedPermutation(100, f"data:{seed}")(np.arange(100))
    assert sorted(order.tolist()) == list(range(100))
    first, same, other = (torch.empty(64) for _ in range(3))
    for out, number in ((first, seed), (same, seed), (other, 0)):
        fill_flat_(out, name="w", numel=64, start=0, spec=InitSpec("normal", 1.0), seed=number)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
