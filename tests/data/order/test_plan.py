"""SEMANTICS 10 and 11 with schedules: any batch directly, and no token twice or left out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.data.corpus_info import planned_batches
from toolkit.data.order.batches import StreamBatches
from toolkit.data.order.plan import BatchPlan, Phase, Segment
from toolkit.data.order.schedule import BatchSizeChangeConfig, SequenceLengthChangeConfig
from toolkit.data.order.stream import ShuffledStream

FAR = 10**12


def plan(phases: list[Phase], epoch: int = FAR, *, apart: bool = False) -> BatchPlan:
    first = BatchPlan([Segment(0, 0, 1)], epoch_instances=epoch, keeps_epochs_apart=apart)
    return first.continued((), 0, phases)


def in_turn(phases: list[Phase], number: int) -> list[tuple[int, int]]:
    """(size, row split) of each batch, looked up by what was used before it."""
    found, used = [], 0
    for _ in range(number):
        phase = [p for p in phases if p.start <= used][-1]
        found.append(phase[1:])
        used += phase.batch_instances
    return found


PHASES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 20), st.sampled_from([1, 2, 4])),
    min_size=1,
    max_size=6,
    unique_by=lambda phase: phase[0],
).map(lambda found: [Phase(0, *sorted(found)[0][1:]), *(Phase(*p) for p in sorted(found)[1:])])


@settings(deadline=None, max_examples=150)
@given(phases=PHASES, epoch=st.integers(20, 90), apart=st.booleans())
def test_sizes_are_a_function_of_what_was_used_before(
    phases: list[Phase], epoch: int, apart: bool
) -> None:
    made = plan(phases, epoch, apart=apart)
    expected = in_turn(phases, 60)
    assert [made.segment(n)[2:] for n in range(60)] == expected
    used = [0, *itertools.accumulate(size for size, _ in expected)]
    assert [made.consumed(n) for n in range(61)] == used
    for instances in range(0, used[-1], 7):
        batches = next(n for n, total in enumerate(used) if total >= instances)
        assert made.batches_until(instances) == batches
    # Positions go on, over the end of an epoch only where the next batch does not fit.
    end = 0
    for n in range(60):
        start = made.position(n)
        if apart and start != end:
            assert start % epoch == 0
            assert epoch - end % epoch < expected[n][0] or end % epoch == 0
        else:
            assert start == end
        end = start + expected[n][0]
        assert not apart or start // epoch == (end - 1) // epoch
    for epochs in (1, 2):
        done = made.epoch_end(epochs)
        assert made.next_position(done) <= epochs * epoch
        assert made.next_position(done + 1) > epochs * epoch


@settings(deadline=None, max_examples=100)
@given(phases=PHASES, stops=st.lists(st.integers(0, 40), max_size=4), epoch=st.integers(20, 90))
def test_a_resumed_plan_is_the_plan(phases: list[Phase], stops: list[int], epoch: int) -> None:
    whole = plan(phases, epoch, apart=True)
    parts = whole
    for stop in sorted(stops):
        parts = parts.continued(parts.segments, stop, phases)
    assert parts.segments == whole.segments


@settings(deadline=None, max_examples=60)
@given(
    plans=st.lists(st.tuples(PHASES, st.integers(1, 15)), min_size=1, max_size=4),
    num_instances=st.integers(60, 400),
)
def test_stops_and_other_schedules_leave_no_gap_and_repeat_nothing(
    plans: list[tuple[list[Phase], int]], num_instances: int
) -> None:
    stream = ShuffledStream(num_instances, fingerprint="f", seed=1, shuffle=True)
    order = StreamBatches(stream, [Segment(0, 0, 1)])
    batch, seen = 0, []
    for phases, steps in plans:
        order = order.continued(order.segments if batch else (), batch, phases)
        for n in range(batch, batch + steps):
            seen.append(order.indices(n)[0])
        batch += steps
    epochs: dict[int, list[int]] = {}
    for n, indices in enumerate(seen):
        epochs.setdefault(order.epoch_of(n)[0], []).extend(indices.tolist())
    largest = max(phase.batch_instances for phases, _ in plans for phase in phases)
    for number, found in epochs.items():
        assert len(set(found)) == len(found)
        if number < max(epochs):
            assert num_instances - len(found) < largest
    again = StreamBatches(stream, order.segments)
    assert all(np.array_equal(again.indices(n)[0], seen[n]) for n in range(batch))


def test_a_batch_far_away_costs_what_the_first_one_does() -> None:
    made = plan([Phase(0, 64), Phase(10**9, 128), Phase(10**11, 256)], epoch=10**10, apart=True)
    assert made.segment(10**9).batch_instances == 256
    assert made.consumed(10**9) == 10**11 + (10**9 - made.segments[-1].first_batch) * 256


def data(**loader: object) -> DataConfig:
    dataset = DatasetConfig(sequence_length=64)
    return DataConfig(dataset=dataset, data_loader=DataLoaderConfig(**loader))  # type: ignore[arg-type]


def test_schedules_in_tokens_and_doublings() -> None:
    batches = planned_batches(
        data(
            global_batch_size=256,
            batch_size_schedule=(
                BatchSizeChangeConfig(tokens=1000),
                BatchSizeChangeConfig(tokens=3000),
                BatchSizeChangeConfig(tokens=5000, global_batch_size=256),
            ),
            sequence_length_schedule=(
                SequenceLengthChangeConfig(tokens=0, sequence_length=16),
                SequenceLengthChangeConfig(tokens=600),
                SequenceLengthChangeConfig(tokens=1100),
            ),
        ),
        epoch_instances=100,
    )
    steps = range(13)
    assert [batches.tokens_done(n) for n in steps] == [
        0, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 5376, 5632,
    ]  # fmt: skip
    assert [batches.batch_tokens(n) for n in steps] == [256] * 4 + [512] * 4 + [1024] * 2 + [
        256
    ] * 3
    assert [batches.row_length(n) for n in steps] == [16] * 3 + [32] * 2 + [64] * 8
    assert [batches.steps_of(n, "tokens") for n in (1024, 1025, 5120)] == [4, 5, 10]
    # An epoch is 6,400 tokens: after 5,120 there are 1,280 left, five batches of 256.
    assert batches.steps_of(1, "epochs") == 15
    assert batches.epochs_done(15) == 1.0


def test_epochs_never_go_back_where_batches_get_smaller() -> None:
    segments = [Segment(0, 0, 40), Segment(2, 80, 10), Segment(6, 120, 90)]
    made = BatchPlan(segments, epoch_instances=100, keeps_epochs_apart=True)
    assert [made.position(n) for n in range(8)] == [0, 40, 80, 90, 100, 110, 200, 300]
    assert [made.epochs_done(n) for n in range(9)] == [0, 0.5, 1, 1, 1, 1.1, 1.2, 3, 4]
    # The first two batches did not know of the change: what they were told stays.
    before = made.with_segments(segments[:1])
    assert [before.epochs_done(n) for n in range(3)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([(0, None)], "batch_size_schedule.0.global_batch_size: needed at tokens 0"),
        ([(5, 64), (5, 128)], "batch_size_schedule.1.tokens is 5, after 5: .* more than 5"),
        ([(9, 64), (5, 128)], "batch_size_schedule.1.tokens is 5, after 9"),
        ([(-1, 64)], "batch_size_schedule.0.tokens must not be negative"),
        ([(1, 0)], "batch_size_schedule.0.global_batch_size must be greater than 0"),
    ],
)
def test_changes_that_make_no_schedule(
    changes: list[tuple[int, int | None]], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        data(
            batch_size_schedule=tuple(
                BatchSizeChangeConfig(tokens=tokens, global_batch_size=size)
                for tokens, size in changes
            )
        )
