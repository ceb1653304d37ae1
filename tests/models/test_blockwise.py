"""Attention in blocks of queries against SDPA, by every mask, with gradients."""

from functools import partial

import pytest
import torch

from tests.models.test_queries_of_a_part import QUERIES, SEQ, starts_of
from toolkit.models import attention
from toolkit.models.attention import attend
from toolkit.models.masks import AttentionMask, take


def heads_with_gradients(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, n, SEQ, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("queries", [None, QUERIES], ids=["row", "part"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["none", "row", "documents"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_blocks_give_the_numbers_and_gradients_of_sdpa(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, kind: str, window: int | None, queries
) -> None:
    if kind == "none" and (window is not None or queries is not None):
        pytest.skip("needs a mask")
    query, key, value = heads = heads_with_gradients(kv_heads)
    own = query if queries is None else take(query, queries, dim=2)
    mask = None
    if kind != "none":
        options = {"window": window, "dtype": torch.float64, "head_dim": 8, "queries": queries}
        mask = AttentionMask(starts_of(kind), **options)
    compute = partial(attend, own, key, value, mask, scale=0.3)
    expected = compute()
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, heads, upstream, retain_graph=True)
    monkeypatch.setattr(attention, "computes_in_blocks", lambda *_: True)
    monkeypatch.setattr(attention, "SMALLER_PIECE_SIZE", 5)
    got = compute()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, heads, upstream), gradients)


def test_compiled_blocks_give_the_numbers_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.models.blockwise.prefers_blocks", lambda *_: True)
    monkeypatch.setattr(attention, "SMALLER_PIECE_SIZE", 20)
    heads = [x.detach().float().requires_grad_() for x in heads_with_gradients(2)]
    mask = AttentionMask(starts_of("documents"), window=30, dtype=torch.float32, head_dim=8)
    expected = attend(*heads, mask)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False)(*heads, mask)
    upstream = torch.randn(expected.shape)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(out, heads, upstream) for out in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_nothing_is_kept_that_grows_with_the_square_of_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "computes_in_blocks", lambda *_: True)
    kept: list[int] = []
    heads = heads_with_gradients(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        attend(*heads, None)
    assert max(kept) == heads[0].numel()
