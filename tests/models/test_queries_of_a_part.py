"""Queries of some places of a row, against the keys of all or of other places."""

import pytest
import torch

from toolkit.models import attention, masks
from toolkit.models.attention import attend
from toolkit.models.masks import AttentionMask, block_mask, document_starts, first_keys, take

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEQ = 48
QUERIES = (range(6, 12), range(36, 42))


def starts_of(kind: str, seq: int = SEQ) -> torch.Tensor:
    if kind == "row":
        return torch.zeros(1, seq, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    return document_starts((torch.rand(2, seq, generator=generator) < 0.1).cumsum(1))


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["row", "documents"])
def test_they_see_what_they_see_in_the_whole_row(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    window: int | None,
    soft_cap: float | None,
    backend: str,
) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, SEQ, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    options = {"window": window, "dtype": torch.float64, "head_dim": 8}
    whole = AttentionMask(starts_of(kind), **options)
    expected = take(attend(query, key, value, whole, soft_cap=soft_cap), QUERIES, dim=2)
    monkeypatch.setattr(attention, "PIECE_SIZE", 4)
    monkeypatch.setattr(masks, "attention_backend", lambda *_: backend)
    with torch.compiler.set_stance("force_eager"):
        part = AttentionMask(starts_of(kind), queries=QUERIES, **options)
        got = attend(take(query, QUERIES, dim=2), key, value, part, soft_cap=soft_cap)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("kind", ["row", "documents"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((range(256, 512), range(1024, 1280)), (range(1536),)),
        ((range(256, 512), range(1024, 1280)), (range(256), range(1280, 1536))),
        ((range(100, 300), range(900, 1100)), (range(50, 250), range(700, 900))),
    ],
)
def test_blocks_hold_every_seen_pair_and_full_ones_no_other(
    queries: masks.Ranges, keys: masks.Ranges, kind: str, window: int | None
) -> None:
    every = torch.arange(1536)
    first = take(first_keys(starts_of(kind, 1536), window), queries, dim=1)
    places, others = take(every, queries, dim=0), take(every, keys, dim=0)
    seen = masks.score_bias(first, torch.float32, places, others)[:, 0] == 0
    blocks = block_mask(first, places, others)
    size = masks.BLOCK_SIZE
    padded = torch.nn.functional.pad(seen, (0, -len(others) % size, 0, -len(places) % size))
    tiles = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    some, all_of = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert torch.equal(full, all_of)
    assert not (some & ~(partial | full)).any()
    if places.numel() % size == 0 and kind == "row":  # no block across two stretches
        assert torch.equal(partial | full, some)
    batch = torch.arange(seen.shape[0])[:, None, None]
    index = torch.arange(len(places))[:, None], torch.arange(len(others))
    assert torch.equal(blocks.mask_mod(batch, batch, *index).expand_as(seen), seen)


def listed(counts: torch.Tensor | None, indices: torch.Tensor | None) -> torch.Tensor:
    """Which blocks are listed, `(batch, rows, columns)`."""
    assert counts is not None
    assert indices is not None
    chosen = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(chosen).scatter(-1, indices.long(), chosen)[:, 0]
