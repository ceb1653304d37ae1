"""The places where parallelism is put into a model from outside, tried without any."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.models.config import TransformerConfig
from toolkit.models.feed_forward import dispatch
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import IGNORE_INDEX, VocabularyShard, chunked_linear_cross_entropy
from toolkit.models.masks import document_positions, document_starts
from toolkit.models.router import RouterSums, router_loss, router_sums

CONFIG = TransformerConfig(
    vocab_size=90, d_model=32, num_layers=4, num_heads=4, intermediate_size=48, init_std=0.1,
    max_sequence_length=32, sliding_window=6, attention_pattern=("sliding", "full"),
    moe=MoEConfig(
        num_experts=4, top_k=2, intermediate_size=16, dense_layers=(1,),
        router_z_loss_multiplier=0.02,
    ),
)  # fmt: skip


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(90, (2, 25), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, :3] = IGNORE_INDEX
    documents = torch.tensor([0] * 7 + [1] * 17).expand(2, -1)
    return {"input_ids": ids[:, :-1], "labels": labels, "document_ids": documents}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bounds", [[0, 1, 4], [0, 2, 3, 4]])
def test_stages_of_a_pipeline_compute_what_the_whole_does(tied: bool, bounds: list[int]) -> None:
    config, given = CONFIG.replace(tie_embeddings=tied), batch()
    whole = config.build().double()
    expected = whole(**given)
    expected.loss.backward()
    stages = [config.build().double() for _ in bounds[1:]]
    x, routers = given.pop("input_ids"), torch.zeros((), dtype=torch.float64)
    for stage, start, end in zip(stages, bounds, bounds[1:], strict=False):
        stage.keep_layers(range(start, end))
        result = stage(x, **given)
        if stage is not stages[-1]:
            x, sums = result
            if sums is not None:
                routers = routers + router_loss(sums, config.moe)
    (result.loss + routers).backward()
    assert (result.loss + routers).item() == pytest.approx(expected.loss.item(), rel=1e-14)
    found: dict[str, Tensor] = {}
    for name, grad in (pair for stage in stages for pair in gradients(stage).items()):
        assert name not in found or (tied and name == "embeddings.tokens.weight")
        found[name] = found[name] + grad if name in found else grad
    names = dict(whole.named_parameters())
    assert found.keys() == names.keys()
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-14)
    assert set(stages[0].state_dict()) | set(stages[-1].state_dict()) <= set(whole.state_dict())


def test_positions_and_starts_may_be_given_instead_of_documents() -> None:
    model, given = CONFIG.build(), batch()
    expected = model(**given)
    starts = document_starts(given.pop("document_ids"))
    got = model(**given, starts=starts, positions=document_positions(starts))
    assert torch.equal(got.loss, expected.loss)


def test_rows_may_be_shorter_in_the_residual_stream_than_their_positions() -> None:
    """As with sequence parallelism, where attention gathers what lies between."""
    model, ids = CONFIG.replace(moe=None).build(), batch()["input_ids"]
    whole: list[
        Tensor
    ] = []  # inputs of attention by layer: what another rank would have the rest of
    hooks = [
        block.attention.register_forward_hook(lambda module, args, out: whole.append(args[0]))
        for block in model.blocks
    ]
    expected = model(ids)
    for hook, block, rows in zip(hooks, model.blocks, whole, strict=True):
        hook.remove()
        inner = block.attention.forward

        def forward(x: Tensor, *inputs: Any, _rows: Tensor = rows, _inner: Any = inner) -> Tensor:
            torch.testing.assert_close(x, _rows[:, :12], rtol=1e-5, atol=1e-6)
            return _inner(_rows, *inputs)[:, :12]

        block.attention.forward = forward
    embed = model.embeddings.forward
    model.embeddings.forward = lambda ids, positions: embed(ids, positions)[:, :12]
    got = model(ids, positions=torch.arange(24)[None])
    torch.testing.assert_close(got, expected[:, :12], rtol=1e-5, atol=1e-6)


def test_attend_dispatch_and_the_routers_sums_can_be_replaced() -> None:
    model, given, calls = CONFIG.build(), batch(), []
    expected = model(**given).loss
    for block in model.blocks:
        inner = block.attention.attend

        def attend(*heads: Any, _inner: Any = inner, **options: Any) -> Tensor:
            calls.append("attend")
            return _inner(*heads, **options)

        block.attention.attend = attend
        if block.has_experts:

            def moved(tokens: Tensor, choice: Any, experts: Any) -> Tensor:
                def elsewhere(rows: Tensor, ends: Tensor) -> Tensor:
                    calls.append("experts")
                    return experts(rows.clone(), ends)

                return dispatch(tokens, choice, elsewhere)

            def sums(*args: Tensor) -> RouterSums:
                calls.append("sums")
                return router_sums(*args)

            block.feed_forward.dispatch, block.feed_forward.router_sums = moved, sums
    assert torch.equal(model(**given).loss, expected)
    assert sorted(calls) == ["attend"] * 4 + ["experts"] * 3 + ["sums"] * 3


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("shards", [2, 4])
def test_a_vocabulary_in_shards_gives_the_same_loss(shards: int, soft_cap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 24, generator=generator, dtype=torch.float64) / 4
    labels = torch.randint(50, (37,), generator=generator)
    labels[::5] = IGNORE_INDEX
    options: Any = {
        "vocab_size": 50, "z_loss_multiplier": 1e-2, "soft_cap": soft_cap, "chunk_size": 10
    }  # fmt: skip

    def run(rows: Tensor, shard: VocabularyShard | None) -> tuple[Tensor, Tensor, Tensor]:
        own = [hidden.clone().requires_grad_(), rows.clone().requires_grad_()]
        sums = chunked_linear_cross_entropy(*own, labels, shard=shard, **options)
        return sums.loss, *torch.autograd.grad(sums.loss, own)

    barrier, slots = threading.Barrier(shards), [torch.empty(0)] * shards
    size = 64 // shards

    def rank(number: int) -> tuple[Tensor, Tensor, Tensor]:
        def gather(values: Tensor) -> Tensor:
            slots[number] = values
            barrier.wait()
            stack = torch.stack(slots)
            barrier.wait()
            return stack

        rows = weight[number * size : (number + 1) * size]
        return run(rows, VocabularyShard(number * size, shards, gather))

    loss, grad_hidden, grad_weight = run(weight, None)
    with ThreadPoolExecutor(shards) as pool:
        results = list(pool.map(rank, range(shards)))
    for own in results:
        torch.testing.assert_close(own[0], loss, rtol=1e-13, atol=0)
    total = sum((own[1] for own in results), torch.zeros(()))
    torch.testing.assert_close(total, grad_hidden, rtol=1e-11, atol=1e-14)
    parts = torch.cat([own[2] for own in results])
    torch.testing.assert_close(parts, grad_weight, rtol=1e-11, atol=1e-14)
