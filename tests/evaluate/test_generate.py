"""Sampling: deterministic, bounded, and what it says of temperature and top_k."""

from typing import Any

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.evaluate.generate import generate
from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=50,
    d_model=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=24,
    max_sequence_length=12,
    init_std=0.5,
)


class Fixed:
    """A "model" whose next-token logits are given; notes the lengths it was called with."""

    def __init__(self, *logits: float) -> None:
        self.logits = torch.tensor(logits)
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, /) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return self.logits.expand(*input_ids.shape, -1)


def test_same_seed_same_text_other_seed_other_text():
    model = CONFIG.build()
    first, again, other = (
        generate(model, [1, 2], max_new_tokens=20, temperature=1.0, top_k=None, seed=seed)
        for seed in (3, 3, 4)
    )
    assert len(first) == 20
    assert first == again != other
    assert all(0 <= i < 50 for i in first)


def test_sampling_leaves_the_global_random_state_and_the_mode_alone():
    model = CONFIG.build().train()
    before = torch.get_rng_state()
    generate(model, [1], max_new_tokens=3)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_temperature_zero_follows_the_most_likely_id():
    model = CONFIG.build()
    out = generate(model, [1, 2, 3], max_new_tokens=5, temperature=0)
    ids = [1, 2, 3]
    for new in out:
        assert new == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(new)


def test_frequencies_are_those_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    out = generate(Fixed(*logits), [0], max_new_tokens=4000, temperature=0.5, max_sequence_length=4)
    counts = torch.bincount(torch.tensor(out), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.softmax(logits / 0.5, 0), atol=0.02, rtol=0)


def test_top_k_leaves_out_the_rest():
    model = Fixed(0.0, 3.0, 1.0, 2.0)
    out = generate(model, [0], max_new_tokens=200, top_k=2, max_sequence_length=4)
    assert set(out) == {1, 3}


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()
    settings: Any = {"max_new_tokens": 200, "max_sequence_length": 4}
    for top_p, kept in ((0.35, {2}), (0.45, {2, 0}), (0.75, {2, 0, 3}), (1.0, {0, 1, 2, 3})):
        assert set(generate(Fixed(*logits), [0], top_p=top_p, **settings)) == kept
    assert set(generate(Fixed(*logits), [0], top_k=2, top_p=0.99, **settings)) == {0, 2}


def test_each_new_id_is_told_and_several_can_end():
    told: list[int] = []
    settings: Any = {"max_new_tokens": 9, "temperature": 0, "max_sequence_length": 4}
    out = generate(Fixed(0.0, 9.0), [0], eos_id={5, 1}, on_token=told.append, **settings)
    assert out == told == [1]


def test_ends_with_the_end_token():
    out = generate(Fixed(0.0, 9.0), [0], max_new_tokens=9, temperature=0, eos_id=1,
                   max_sequence_length=4)  # fmt: skip
    assert out == [1]


def test_ranks_that_see_other_logits_follow_the_broadcast_choice():
    first, second = Fixed(0.0, 9.0, 0.0), Fixed(0.0, 0.0, 9.0)
    said = []

    def say(choice: int) -> int:
        said.append(choice)
        return choice

    settings: Any = {"max_new_tokens": 3, "temperature": 0, "eos_id": 2, "max_sequence_length": 8}
    from_first = generate(first, [0], broadcast=say, **settings)
    heard = iter(said)
    from_second = generate(second, [0], broadcast=lambda _: next(heard), **settings)
    assert from_first == from_second == [1, 1, 1]
    assert first.lengths == second.lengths == [1, 2, 3]


def test_window_never_exceeds_the_longest_sequence():
    model = Fixed(0.0, 1.0)
    generate(model, [0, 1, 0], max_new_tokens=5, max_sequence_length=4)
    assert model.lengths == [3, 4, 4, 4, 4]
    assert len(generate(CONFIG.build(), [1] * 10, max_new_tokens=9)) == 9


def test_compiled_model_is_sampled_without_compiling():
    torch._dynamo.reset()
    model = CONFIG.build()
    expected = generate(model, [1], max_new_tokens=5)
    compile_model(model, backend=_refuse)
    assert generate(model, [1], max_new_tokens=5) == expected


def _refuse(graph, example_inputs):
    raise AssertionError("compiled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_ids": []}, "prompt: empty"),
        ({"temperature": -1.0}, r"temperature -1\.0, .*: none of them can be negative"),
        ({"top_k": -1}, "top_k -1, .*none of them can be negative"),
        ({"top_p": 0.0}, r"top_p 0\.0: give a sum of probabilities"),
    ],
)
def test_bad_settings_are_named(settings, message):
    arguments = {"prompt_ids": [1], "max_new_tokens": 1, "max_sequence_length": 4, **settings}
    with pytest.raises(ConfigError, match=message):
        generate(Fixed(0.0, 1.0), **arguments)
