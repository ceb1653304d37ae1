import numpy as np
import pytest

from toolkit.data.instances import rows
from toolkit.data.instances.rows import gather_rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("has_targets", [False, True])
@pytest.mark.parametrize("long_piece", [0, 200])
def test_rows_are_their_pieces_one_after_the_other_and_padding(
    seed: int, has_targets: bool, long_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LONG_PIECE", long_piece)  # copied piece by piece, or indexed
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 60_000, 500).astype(np.uint16)
    targets = generator.integers(0, 2, 500).astype(np.uint8) if has_targets else None
    counts = generator.integers(1, 5, 20)
    lengths = generator.integers(0, 9, counts.sum())
    starts = generator.integers(0, 492, counts.sum())
    found = gather_rows(tokens, targets, (starts, lengths, counts), sequence_length=40, pad_id=7)
    assert [(name, values.dtype) for name, values in found.items()] == [
        ("input_ids", np.int64), ("label_mask", np.bool_), ("document_ids", np.int32)
    ]  # fmt: skip
    pieces = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    for row, count in enumerate(counts.tolist()):
        own, pieces = pieces[:count], pieces[count:]
        ids, mask, documents = [], [], []
        for number, (start, length) in enumerate(own):
            ids += tokens[start : start + length].tolist()
            asked = np.ones(length) if targets is None else targets[start : start + length]
            mask += (asked != 0).tolist()
            documents += [number] * length
        padding = 40 - len(ids)
        assert found["input_ids"][row].tolist() == ids + [7] * padding
        assert found["label_mask"][row].tolist() == mask + [False] * padding
        assert found["document_ids"][row].tolist() == documents + [count] * padding
