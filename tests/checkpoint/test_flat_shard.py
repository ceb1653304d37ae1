"""A flat range of a row-major tensor as boxes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.distributed.shards import FlatShard, flat_range_boxes


@given(st.data())
def test_boxes_cover_the_range_exactly_once_and_are_few(data: st.DataObject) -> None:
    shape = torch.Size(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    numel = shape.numel()
    start = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - start))
    boxes = flat_range_boxes(shape, start, length)
    assert len(boxes) <= 2 * (len(shape) - 1) + 1
    whole = torch.arange(numel).reshape(shape)
    seen = torch.full((length,), -1)
    for offsets, sizes, position in boxes:
        index = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        part = whole[index].reshape(-1)
        assert torch.equal(seen[position : position + len(part)], torch.full_like(part, -1))
        seen[position : position + len(part)] = part
    assert torch.equal(seen, torch.arange(start, start + length))


def test_a_piece_is_the_live_memory_and_no_more_of_it() -> None:
    flat = torch.arange(20.0)
    shard = FlatShard(flat.narrow(0, 4, 9), shape=torch.Size([5, 3]), start=2)
    pieces = [
        shard.__get_tensor_shard__(item.index) for item in shard.__create_write_items__("x", shard)
    ]
    assert [piece.tolist() for piece in pieces] == [[[4]], [[5, 6, 7], [8, 9, 10]], [[11, 12]]]
    assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces)
    pieces[1].fill_(-1)
    assert flat.tolist() == [0, 1, 2, 3, 4, *[-1] * 6, *range(11, 20)]
