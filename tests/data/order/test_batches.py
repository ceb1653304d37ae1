import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.order.batches import StreamBatches
from toolkit.data.order.plan import Phase, Segment
from toolkit.data.order.stream import ShuffledStream


class Endless:
    """Position p is instance p."""

    keeps_epochs_apart = False
    epoch_instances = 100
    end = None

    def indices(self, positions: np.ndarray) -> np.ndarray:
        return positions


def stream(num_instances: int = 103, *, shuffle: bool = True, seed: int = 3) -> ShuffledStream:
    return ShuffledStream(num_instances, fingerprint="f", seed=seed, shuffle=shuffle)


def test_epochs_are_permutations_and_drop_what_does_not_fill_a_batch() -> None:
    order = StreamBatches(stream(103), [Segment(0, 0, 10)])
    assert order.steps_per_epoch == 10
    for epoch in range(3):
        seen = order.indices(epoch * 10, 10).reshape(-1)
        assert len(np.unique(seen)) == 100
        assert order.epoch_of(epoch * 10 + 9) == (epoch, 9)
    assert order.epoch_end(3) == 30
    assert order.position(10) == 103


def test_any_batch_directly_is_that_batch_in_turn() -> None:
    order = StreamBatches(stream(57), [Segment(0, 0, 8), Segment(5, 40, 3), Segment(9, 52, 16)])
    for first in range(20):
        count = order.batches_in_segment(first, 4)
        together = order.indices(first, count)
        alone = [order.indices(n)[0] for n in range(first, first + count)]
        assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_segments_are_read_apart() -> None:
    order = StreamBatches(stream(57), [Segment(0, 0, 8), Segment(5, 40, 3)])
    assert order.batches_in_segment(3, 10) == 2
    assert order.batches_in_segment(5, 10) == 10
    assert order.indices(4).shape == (1, 8)
    assert order.indices(5).shape == (1, 3)


@settings(deadline=None, max_examples=80)
@given(
    num_instances=st.integers(20, 200),
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    steps=st.lists(st.integers(1, 30), min_size=5, max_size=5),
)
def test_a_new_size_goes_on_with_the_next_unseen_instance(
    num_instances: int, sizes: list[int], steps: list[int]
) -> None:
    """Within an epoch nothing is seen twice, and all that is left out is less than one batch."""
    source = stream(num_instances, shuffle=False)
    order, batch = StreamBatches(source, [Segment(0, 0, sizes[0])]), 0
    seen: dict[int, list[int]] = {}
    for size, count in zip(sizes, steps, strict=False):
        unseen = order.next_position(batch)
        order = order.continued(order.segments, batch, [Phase(0, size)])
        assert order.next_position(batch) == unseen
        start = order.position(batch)
        assert start == unseen or unseen % num_instances + size > num_instances
        for n in range(batch, batch + count):
            epoch, _ = order.epoch_of(n)
            seen.setdefault(epoch, []).extend(order.indices(n)[0].tolist())
        batch += count
    for numbers in seen.values():
        assert numbers == sorted(set(numbers))
    for epoch in list(seen)[:-1]:
        assert num_instances - len(seen[epoch]) < max(sizes)


def test_the_end_of_an_epoch_counts_batches_of_both_sizes() -> None:
    order = StreamBatches(stream(100), [Segment(0, 0, 10)]).continued(
        [Segment(0, 0, 10)], 4, [Phase(0, 5)]
    )
    assert order.segments == (Segment(0, 0, 10), Segment(4, 40, 5))
    assert order.epoch_end(1) == 4 + 12
    assert order.epoch_end(2) == 4 + 12 + 20
    assert order.epoch_of(15) == (0, 19)
    assert order.epoch_of(16) == (1, 0)


def test_an_endless_stream_has_no_gaps_between_passes() -> None:
    order = StreamBatches(Endless(), [Segment(0, 0, 7)]).continued(
        [Segment(0, 0, 7)], 20, [Phase(0, 9)]
    )
    assert order.indices(19)[0].tolist() == list(range(133, 140))
    assert order.indices(20)[0].tolist() == list(range(140, 149))
    assert order.epoch_end(3) == 20 + (300 - 140) // 9
    assert order.epoch_of(20)[0] == 1


def test_the_same_size_again_changes_nothing() -> None:
    segments = (Segment(0, 0, 10), Segment(4, 40, 5))
    assert (
        StreamBatches(stream(), [Segment(0, 0, 5)]).continued(segments, 9, [Phase(0, 5)]).segments
        == segments
    )


@pytest.mark.parametrize("num_instances", [10**9, 10**12 // 1024])
def test_batch_a_million_is_computed_directly(num_instances: int) -> None:
    order = StreamBatches(stream(num_instances), [Segment(0, 0, 64)])
    batch = order.indices(1_000_000)[0]
    assert batch.shape == (64,)
    assert len(np.unique(batch)) == 64
    assert batch.max() < num_instances
