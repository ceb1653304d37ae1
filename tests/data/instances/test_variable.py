import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.instances.token_corpus import numbered_documents, write_documents
from toolkit.data.instances.base import DocumentPart
from toolkit.data.instances.plans import Bucket
from toolkit.data.instances.variable import VariableDataset, VariableOrder
from toolkit.errors import ConfigError, DataError


def bucket_rows(dataset: VariableDataset) -> dict[int, np.ndarray]:
    return {
        b.length: dataset.read(np.arange(b.first, b.first + b.num_instances))["input_ids"]
        for b in dataset.buckets
    }


def test_documents_are_cut_into_powers_of_two_the_greatest_first(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, numbered_documents([23, 1, 6, 0, 4]))
    dataset = VariableDataset(prepared, "train", 8, min_length=2)
    rows = bucket_rows(dataset)
    assert {length: found.tolist() for length, found in rows.items()} == {
        2: [[20, 21], [28, 29]],
        4: [[16, 17, 18, 19], [24, 25, 26, 27], [30, 31, 32, 33]],
        8: [list(range(8)), list(range(8, 16))],
    }
    assert dataset.pieces(np.arange(7))[1].tolist() == [2, 2, 4, 4, 4, 8, 8]
    assert dataset.documents(3) == [DocumentPart(2, 0, 4, 6)]
    assert (dataset.header.dropped_tokens, dataset.header.dropped_documents) == (2, 1)
    assert dataset.header.num_tokens == 32


def test_rows_of_several_lengths_are_not_read_together(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, numbered_documents([8, 4]))
    dataset = VariableDataset(prepared, "train", 8, min_length=2)
    with pytest.raises(ValueError, match=r"not of \(4, 8\)"):
        dataset.read(np.array([1, 0]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=40).filter(lambda x: sum(x) > 0),
    shortest=st.sampled_from([2, 4, 16]),
)
def test_every_token_is_in_one_row_or_counted_as_dropped(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shortest: int
) -> None:
    prepared = write_documents(tmp_path_factory.mktemp("variable"), numbered_documents(lengths))
    dataset = VariableDataset(prepared, "train", 16, min_length=shortest)
    found = [ids.reshape(-1) for ids in bucket_rows(dataset).values()]
    tokens = np.concatenate(found).tolist() if found else []
    assert len(tokens) == len(set(tokens)) == dataset.header.num_tokens
    assert len(tokens) + dataset.header.dropped_tokens == sum(lengths)
    assert dataset.header.dropped_tokens == sum(n % shortest for n in lengths)
    for index in range(dataset.num_instances):
        assert len(dataset.documents(index)) == 1


def test_masks_ride_along(tmp_path: Path) -> None:
    targets = [[1, 0, 0, 1, 1, 1]]
    prepared = write_documents(tmp_path, numbered_documents([6]), targets=targets)
    dataset = VariableDataset(prepared, "train", 4, min_length=2)
    assert dataset.read(np.array([1]))["label_mask"].tolist() == [[True, False, False, True]]
    assert dataset.read(np.array([0]))["label_mask"].tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("sequence_length", "min_length", "message"),
    [
        (48, 2, "sequence_length 48 must be a power of two .* the nearest are 32 and 64"),
        (8, 16, "min_sequence_length 16 is more than dataset.sequence_length 8"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    tmp_path: Path, sequence_length: int, min_length: int, message: str
) -> None:
    prepared = write_documents(tmp_path, numbered_documents([60]))
    with pytest.raises(ConfigError, match=message):
        VariableDataset(prepared, "train", sequence_length, min_length=min_length)


BUCKETS = (Bucket(8, 0, 101), Bucket(16, 101, 37), Bucket(32, 138, 23))


def make_order(**changes) -> VariableOrder:
    settings_ = {"global_batch_size": 64, "fingerprint": "f", "seed": 1, "num_cycles": 3}
    return VariableOrder(BUCKETS, **{**settings_, **changes})


@pytest.mark.parametrize("curriculum", ["natural", "grow", "shrink"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_instance_at_most_once(curriculum: str, shuffle: bool) -> None:
    order = make_order(curriculum=curriculum, shuffle=shuffle)
    # 101 // 8 + 37 // 4 + 23 // 2 batches; 5 rows of 8, 1 of 16 and 1 of 32 are left over.
    assert order.steps_per_epoch == 12 + 9 + 11
    assert order.dropped_instances == 7
    assert 101 * 8 + 37 * 16 + 23 * 32 - order.steps_per_epoch * 64 == 5 * 8 + 16 + 32
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        seen = []
        for n in range(first, first + order.steps_per_epoch):
            batch, length = order.batch(n), order.length_of_batch(n)
            assert batch.dtype == np.int64
            assert len(batch) * length == 64
            bucket = next(b for b in BUCKETS if b.length == length)
            assert batch.min() >= bucket.first
            assert batch.max() < bucket.first + bucket.num_instances
            seen += batch.tolist()
        assert len(seen) == len(set(seen)) == 161 - 7


@pytest.mark.parametrize(("curriculum", "sign"), [("grow", 1), ("shrink", -1)])
def test_lengths_run_from_end_to_end_in_each_cycle(curriculum: str, sign: int) -> None:
    order = make_order(curriculum=curriculum)
    lengths = [order.length_of_batch(n) * sign for n in range(order.steps_per_epoch)]
    falls = sum(later < earlier for earlier, later in itertools.pairwise(lengths))
    assert falls == 2
    assert lengths[0] == min(lengths)
    assert lengths[-1] == max(lengths)


def test_natural_order_mixes_lengths_and_epochs_differ() -> None:
    order = make_order(curriculum="natural")
    steps = order.steps_per_epoch
    epochs = [[order.length_of_batch(e * steps + n) for n in range(steps)] for e in (0, 1)]
    changes = sum(a != b for a, b in zip(epochs[0], epochs[0][1:], strict=False))
    assert changes > 10
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_batch_n_does_not_depend_on_what_was_asked_before() -> None:
    sequential = make_order()
    expected = [sequential.batch(n).tolist() for n in range(70)]
    for n in (69, 3, 31, 32, 0):
        assert make_order().batch(n).tolist() == expected[n]
    assert make_order(seed=2).batch(3).tolist() != expected[3]
    assert make_order(fingerprint="g").batch(3).tolist() != expected[3]


def test_trillions_of_tokens_cost_nothing_to_order() -> None:
    buckets = (Bucket(256, 0, 10**10), Bucket(4096, 10**10, 10**9))
    for curriculum in ("natural", "grow"):
        order = VariableOrder(
            buckets, global_batch_size=1 << 16, fingerprint="f", seed=0, curriculum=curriculum
        )
        n = order.steps_per_epoch - 1
        batch = order.batch(n)
        assert len(batch) * order.length_of_batch(n) == 1 << 16
        assert len(set(batch.tolist())) == len(batch)


def test_more_cycles_than_batches_are_as_many_as_batches() -> None:
    order = make_order(num_cycles=10**9)
    batches = [order.batch(n).tolist() for n in range(order.steps_per_epoch)]
    assert len({index for batch in batches for index in batch}) == 161 - 7


def test_too_little_data_and_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(DataError, match="no row length has that many tokens"):
        make_order(global_batch_size=1024)
    with pytest.raises(DataError, match=r"rows: none"):
        VariableOrder((), global_batch_size=64, fingerprint="f", seed=0)
    with pytest.raises(ConfigError, match="48 is not divisible by rows of 32 tokens"):
        make_order(global_batch_size=48)


def test_what_is_ordered_at_once_changes_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    order = make_order()
    numbers = [*range(2 * order.steps_per_epoch), 3, 40, 1]
    expected = [order.batch(n).tolist() for n in numbers]
    monkeypatch.setattr("toolkit.data.instances.variable.ORDERED_INSTANCES", 1)
    assert [make_order().batch(n).tolist() for n in numbers] == expected
