"""The ring's parts on one process: what each step sees, and every kernel's share of gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.test_queries_of_a_part import starts_of
from toolkit.distributed import ring_attention
from toolkit.distributed.ring_attention import _attended, _gradients, _last_step
from toolkit.distributed.shared_rows import SharedRows
from toolkit.models.masks import first_keys, score_bias

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEQ, RANKS = 48, 3


def rows_of(rank: int, *, stretches: int = 2) -> SharedRows:
    group: Any = SimpleNamespace(size=lambda: RANKS, rank=lambda: rank)
    return SharedRows(group, stretches=stretches)


@pytest.mark.parametrize("stretches", [2, 1])
@pytest.mark.parametrize("window", [None, 5, 20])
@pytest.mark.parametrize("kind", ["row", "documents"])
def test_steps_see_each_pair_of_a_row_once(kind: str, window: int | None, stretches: int) -> None:
    starts = None if kind == "row" else starts_of(kind)
    first = first_keys(starts_of(kind), window)
    every = torch.arange(SEQ)
    expected = (score_bias(first, torch.float32, every, every)[:, 0] == 0).sum()
    found = {}
    for make in (ring_attention._stretches, ring_attention._blocks):
        found[make] = torch.zeros((), dtype=torch.int64)
        for rank in range(RANKS):
            rows = rows_of(rank, stretches=stretches)
            for step in range(_last_step(rows, SEQ, window) + 1):
                x = torch.zeros(1)
                for part in make(rows, step, starts, SEQ, window, x):
                    found[make] += seen_pairs(part, len(first))
        assert found[make] == expected


def seen_pairs(part: Any, batch: int) -> torch.Tensor:
    if part.blocks is not None:
        size = SEQ // RANKS
        at = torch.arange(batch)[:, None, None], 0, torch.arange(size)[:, None], torch.arange(size)
        return part.blocks.mask_mod(*at).sum()
    if part.bias is not None:
        return (part.bias == 0).sum()
    lengths = [s.stop - s.start for s in (part.queries, part.keys)]
    seen = torch.ones(batch, *lengths, dtype=torch.bool)
    return (seen.tril() if part.is_causal else seen).sum()


def test_windows_end_the_ring_early() -> None:
    steps = [
        _last_step(rows_of(0, stretches=stretches), SEQ, window)
        for stretches, window in ((2, None), (1, None), (1, 17), (1, 18))
    ]
    assert steps == [2, 2, 1, 2]


@pytest.mark.parametrize("kernel", ["flash", "written out"])
@pytest.mark.parametrize("heads", [2, 4])
def test_shares_of_parts_add_up_to_the_gradients(
    monkeypatch: pytest.MonkeyPatch, heads: int, kernel: str
) -> None:
    if kernel == "written out":
        monkeypatch.setattr(ring_attention, "_takes_flash", lambda *_: False)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, n, SEQ // 2, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (4, heads, heads)
    )
    rows: Any = SharedRows(SimpleNamespace(size=lambda: 1, rank=lambda: 0), stretches=2)  # type: ignore[arg-type]
    for starts in (None, starts_of("documents", SEQ // 2)):
        parts = ring_attention._stretches(rows, 0, starts, SEQ // 2, None, query)
        first = first_keys(starts_of("row", SEQ // 2) if starts is None else starts, None)
        every = torch.arange(SEQ // 2)
        bias = score_bias(first, query.dtype, every, every)
        repeated = [x.repeat_interleave(4 // heads, 1) for x in (key, value)]
        scores = query @ repeated[0].mT * 0.3 + bias
        out, lse = scores.softmax(-1) @ repeated[1], scores.logsumexp(-1)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        wanted = torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)
        found = [torch.zeros_like(x) for x in wanted]
        total = torch.zeros_like(out)
        with torch.no_grad():
            for part in parts:
                at, keys = part.queries, part.keys
                inputs = query[:, :, at], key[:, :, keys], value[:, :, keys]
                part_out, part_lse = _attended(*inputs, part, 0.3)
                weight = (part_lse - lse[:, :, at]).exp()[..., None]
                total[:, :, at] += weight * part_out
                results = grad[:, :, at], out[:, :, at], lse[:, :, at]
                for x, where, share in zip(
                    found, (at, keys, keys), _gradients(inputs, results, part, 0.3), strict=True
                ):
                    x[:, :, where] += share
        torch.testing.assert_close(total, out.detach(), rtol=1e-12, atol=1e-13)
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_flex_attention_gives_the_results_of_flash() -> None:
    """Its backward runs on CUDA alone; there the ring takes it."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, n, 16, 16, generator=generator) for n in (4, 2, 2))
    rows, starts = rows_of(1), starts_of("documents")
    with torch.compiler.set_stance("force_eager"):
        for step in range(RANKS):
            [blocks] = ring_attention._blocks(rows, step, starts, SEQ, 20, query)
            out, lse = _attended(query, key, value, blocks, None)
            for part in ring_attention._stretches(rows, step, starts, SEQ, 20, query):
                assert part.bias is not None
            places = rows.places(SEQ)
            every = torch.arange(SEQ)
            queries, keys = (
                torch.cat([every[r.start : r.stop] for r in places[n]]) for n in (1, 1 - step)
            )
            bias = score_bias(rows.own(first_keys(starts, 20)), query.dtype, queries, keys)
            whole = ring_attention.Part(
                slice(None), slice(None), bias=bias, is_blind=bias.isneginf().all(-1)
            )
            expected, expected_lse = _attended(query, key, value, whole, None)
            torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
