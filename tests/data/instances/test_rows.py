import numpy as np
import pytest

from toolkit.data.instances import planned as rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("has_targets", [False, True])
def test_copying_pieces_and_indexing_tokens_give_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, seed: int, has_targets: bool
) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 60_000, 500).astype(np.uint16)
    targets = generator.integers(0, 2, 500).astype(np.uint8) if has_targets else None
    counts = generator.integers(1, 5, 20)
    lengths = generator.integers(0, 9, counts.sum())
    starts = generator.integers(0, 492, counts.sum())
    found = []
    for limit in (0, 1000):
        monkeypatch.setattr(rows, "LONG_PIECE", limit)
        found.append(
            rows.gather_rows(
                tokens, targets, starts=starts, lengths=lengths, pieces_per_row=counts,
                sequence_length=40, pad_id=7,
            )
        )  # fmt: skip
    assert list(found[0]) == ["input_ids", "label_mask", "document_ids"]
    for copied, indexed in zip(found[0].values(), found[1].values(), strict=True):
        assert copied.dtype == indexed.dtype
        assert np.array_equal(copied, indexed)
    first = tokens[starts[0] : starts[0] + lengths[0]]
    assert np.array_equal(found[0]["input_ids"][0, : lengths[0]], first)
