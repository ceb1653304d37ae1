"""Compiled blocks and loss: one compilation for all layers, same numbers."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from toolkit.models.compile import compile_model
from toolkit.models.config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=90,
    d_model=32,
    num_layers=4,
    num_heads=2,
    num_key_value_heads=1,
    intermediate_size=48,
    max_sequence_length=32,
    loss_chunk_size=16,
    init_std=0.1,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(90, (2, 33), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_loss_and_gradients_equal_eager(checkpointed):
    eager, compiled = CONFIG.build(), CONFIG.build()
    if checkpointed:
        for index, block in enumerate(compiled.blocks):
            compiled.blocks[index] = checkpoint_wrapper(block)
    compile_model(compiled, fullgraph=True)
    expected = eager(*batch(), z_loss_multiplier=1e-3)
    expected.loss.backward()
    got = compiled(*batch(), z_loss_multiplier=1e-3)
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    pairs = zip(eager.parameters(), compiled.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_one_compilation_serves_all_blocks():
    model, counter = CONFIG.build(), CompileCounter()
    compile_model(model, fullgraph=True, backend=counter)
    for _ in range(2):
        model(*batch()).loss.backward()
    assert counter.frame_count == 2  # one block, one piece of the loss
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("default", [None, None]),
        ("reduce-overhead", ["reduce-overhead", None]),
        ("max-autotune", ["max-autotune", "max-autotune-no-cudagraphs"]),
        ("max-autotune-no-cudagraphs", ["max-autotune-no-cudagraphs"] * 2),
    ],
)
def test_the_loss_is_compiled_in_the_same_mode_but_for_graphs(monkeypatch, mode, expected):
    seen = []

    def record(function=None, *, mode=None, **_):
        seen.append(mode)
        return function

    model = CONFIG.replace(num_layers=1).build()
    monkeypatch.setattr(torch, "compile", record)
    compile_model(model, mode=mode)
    assert seen == expected


def test_a_mode_of_the_compiler_computes_the_same():
    eager, compiled = CONFIG.build(), CONFIG.build()
    compile_model(compiled, mode="reduce-overhead")
    expected, got = eager(*batch()).loss, compiled(*batch()).loss
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_names_and_parameters_stay():
    model = CONFIG.build()
    before = {name: id(p) for name, p in model.named_parameters()}
    compile_model(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def documents(*lengths: int) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).repeat(2, 1)


def test_compiled_documents_train_like_eager_ones_and_stay_apart():
    eager, compiled = CONFIG.build(), CONFIG.build()
    compile_model(compiled, fullgraph=True)
    ids, labels = batch()
    document_ids = documents(9, 20, 3)
    expected = eager(ids, labels, document_ids=document_ids)
    expected.loss.backward()
    got = compiled(ids, labels, document_ids=document_ids)
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
    before = compiled(ids, document_ids=document_ids)
    ids[:, 9:29] = (ids[:, 9:29] + 1) % 90
    after = compiled(ids, document_ids=document_ids)
    assert torch.equal(before[document_ids != 1], after[document_ids != 1])
    assert not torch.equal(before[document_ids == 1], after[document_ids == 1])


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_other_documents_need_no_other_compilation(monkeypatch, backend):
    monkeypatch.setattr("toolkit.models.masks.attention_backend", lambda *_: backend)
    model, counter = CONFIG.build(), CompileCounter()
    compile_model(model, fullgraph=True, backend=counter)
    with torch.no_grad():  # flex attention has no backward on a CPU
        for lengths in ((9, 20, 3), (32,), (1, 2, 29)):
            model(batch()[0], document_ids=documents(*lengths))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_every_length_of_a_curriculum_is_compiled():
    model, counter = CONFIG.build(), CompileCounter()
    compile_model(model, fullgraph=True, backend=counter)  # raises past the limit
    lengths = range(2, 26, 2)
    for length in lengths:
        ids = batch()[0][:, :length]
        model(ids)
        model(ids, document_ids=documents(1, length - 1))
    assert counter.frame_count == 2 * len(lengths) == 24


MIXED = CONFIG.replace(
    num_layers=6,
    norm_placement="sandwich",
    norm_weight_offset=1.0,
    sliding_window=7,
    attention_pattern=("sliding", "sliding", "full"),
    sliding_rope_theta=500.0,
    logit_soft_cap=5.0,
)


@pytest.mark.parametrize("soft_cap", [None, 4.0])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_layers_are_compiled_at_most_once_per_kind(monkeypatch, backend, soft_cap):
    monkeypatch.setattr("toolkit.models.masks.attention_backend", lambda *_: backend)
    model, counter = MIXED.replace(attention_soft_cap=soft_cap).build(), CompileCounter()
    compile_model(model, fullgraph=True, backend=counter)
    with torch.no_grad():  # flex attention has no backward on a CPU
        for _ in range(2):
            model(batch()[0])
        assert counter.frame_count == (1 if (backend, soft_cap) == ("flex", 4.0) else 2)
        counter.frame_count = 0
        for lengths in ((9, 20, 3), (1, 2, 29)):
            model(batch()[0], document_ids=documents(*lengths))
    assert counter.frame_count <= 2


def test_compiled_windows_and_caps_train_like_eager_ones():
    config = MIXED.replace(num_layers=2, attention_pattern=("sliding", "full"))
    config = config.replace(attention_soft_cap=4.0)
    eager, compiled = config.build(), config.build()
    compile_model(compiled, fullgraph=True, backend="aot_eager")
    expected = eager(*batch(), z_loss_multiplier=1e-3)
    expected.loss.backward()
    got = compiled(*batch(), z_loss_multiplier=1e-3)
    got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
