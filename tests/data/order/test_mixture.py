"""Mixed instances, their order, and repetition limits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.data.config import DatasetConfig, MixConfig, MixSourceConfig, RatioChangeConfig
from toolkit.data.instances.base import DocumentPart, Rows
from toolkit.data.order.batches import StreamBatches
from toolkit.data.order.mixture import MixedDataset, MixedStream, check_limits
from toolkit.data.order.plan import Segment
from toolkit.data.order.resolve import limited_instances
from toolkit.errors import ConfigError, DataError

SEQ = 4


class Numbered:
    """Instance i is full of first + i."""

    def __init__(self, num_instances: int, first: int, *extras: str) -> None:
        self.num_instances, self.first, self.extras = num_instances, first, extras
        self.sequence_length = SEQ
        self.fingerprint = f"numbers-{first}-{num_instances}"
        self.bytes_per_token = 4.0
        self.tokenizer_folder: Path | None = None

    def read(self, indices: np.ndarray) -> Rows:
        assert indices.min() >= 0
        assert indices.max() < self.num_instances
        rows: Rows = {"input_ids": np.repeat((self.first + indices)[:, None], SEQ, axis=1)}
        if "label_mask" in self.extras:
            rows["label_mask"] = np.arange(SEQ)[None, :].repeat(len(indices), 0) > 1
        if "document_ids" in self.extras:
            rows["document_ids"] = np.ones((len(indices), SEQ), dtype=np.int32)
        return rows

    def documents(self, index: int) -> list[DocumentPart]:
        return [DocumentPart(index, 0, SEQ, SEQ)]


def mixture(
    sizes: dict[str, int],
    *,
    seed: int = 0,
    shuffle: bool = True,
    schedule: Any = (),
    **changes: Any,
) -> tuple[MixedDataset, MixedStream]:
    """Sources whose ratio is the place of their name in the alphabet, with `changes` by name."""
    config = mix_config(sizes, schedule=schedule, **changes)
    opened = {name: Numbered(size, 1000 * (ord(name) - ord("a"))) for name, size in sizes.items()}
    stream = MixedStream(config, opened, seed=seed, shuffle=shuffle)
    return MixedDataset(opened), stream


def mix_config(names: Any, *, schedule: Any = (), **changes: Any) -> DatasetConfig:
    sources = {
        name: MixSourceConfig(**({"ratio": ord(name) - ord("a") + 1.0} | changes.get(name, {})))
        for name in names
    }
    return DatasetConfig(mix=MixConfig(sources=sources, schedule=schedule), sequence_length=SEQ)


def test_rows_come_back_in_the_order_asked_for() -> None:
    dataset, _ = mixture({"b": 5, "a": 3})
    assert dataset.num_instances == 8
    asked = np.array([7, 0, 3, 2, 4])
    assert dataset.read(asked)["input_ids"][:, 0].tolist() == [1004, 0, 1000, 2, 1001]
    assert dataset.locate(4) == ("b", 1)
    assert dataset.documents(4)[0].document == 1
    assert dataset.bytes_per_token == 4.0


def test_what_only_one_source_says_of_its_rows_is_filled_in() -> None:
    dataset = MixedDataset({"a": Numbered(3, 0), "b": Numbered(3, 9, "label_mask", "document_ids")})
    rows = dataset.read(np.array([3, 0]))
    assert rows["label_mask"].tolist() == [[False, False, True, True], [True] * 4]
    assert rows["document_ids"].tolist() == [[1] * 4, [0] * 4]
    assert rows["document_ids"].dtype == np.int32
    # Also where only the source without them is read: another rank may read the other.
    assert set(dataset.read(np.array([0, 1]))) == set(rows)


def test_each_epoch_of_a_source_is_a_permutation_of_its_own() -> None:
    dataset, stream = mixture({"a": 7, "b": 5, "c": 11})
    first = dataset.read(stream.indices(np.arange(600)))["input_ids"][:, 0]
    assert stream.plan.counts(600) == {"a": 100, "b": 200, "c": 300}
    assert stream.plan.epochs(600)["b"] == 40.0
    for number, size in ((0, 7), (1, 5), (2, 11)):
        mine = first[first // 1000 == number] % 1000
        epochs = [mine[i : i + size].tolist() for i in range(0, len(mine) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5


def test_any_positions_give_the_same_as_all() -> None:
    _, stream = mixture({"a": 7, "b": 50, "c": 11})
    everything = stream.indices(np.arange(5000))
    _, again = mixture({"a": 7, "b": 50, "c": 11})
    for first in (4096, 0, 1000, 4999, 2048):
        some = np.arange(first, min(first + 33, 5000), 3)
        assert np.array_equal(again.indices(some), everything[some])
    assert not stream.keeps_epochs_apart
    assert stream.epoch_instances == 68


def test_order_depends_on_the_seed_and_shares_do_not() -> None:
    _, one = mixture({"a": 70, "b": 50})
    _, two = mixture({"a": 70, "b": 50}, seed=1)
    positions = np.arange(60)
    assert not np.array_equal(one.indices(positions), two.indices(positions))
    assert np.array_equal(one.indices(positions) < 70, two.indices(positions) < 70)
    assert one.fingerprint == two.fingerprint


def test_without_shuffling_sources_come_in_file_order() -> None:
    dataset, stream = mixture({"a": 3, "b": 4}, shuffle=False)
    ids = dataset.read(stream.indices(np.arange(12)))["input_ids"][:, 0]
    assert ids[ids < 1000].tolist() == [0, 1, 2, 0]
    assert ids[ids >= 1000].tolist() == [1000, 1001, 1002, 1003] * 2


def test_a_part_of_a_source_is_random_and_the_same_for_every_seed() -> None:
    limited = {"b": {"max_tokens": 10 * SEQ - 1}}
    seen = []
    for seed in (0, 1):
        dataset, stream = mixture({"a": 30, "b": 40}, seed=seed, **limited)
        ids = dataset.read(stream.indices(np.arange(300)))["input_ids"][:, 0]
        seen.append(sorted(set(ids[ids >= 1000].tolist())))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 10
    assert seen[0] != list(range(1000, 1010))
    assert stream.epoch_instances == 40
    config = mix_config("ab", **limited)
    assert limited_instances(config, {"a": 30, "b": 40}) == 40


def test_ratios_change_at_given_tokens() -> None:
    change = RatioChangeConfig(at_tokens=101 * SEQ - 1, ratios={"a": 0.0})
    dataset, stream = mixture({"a": 7, "b": 9}, schedule=(change,))
    ids = dataset.read(stream.indices(np.arange(300)))["input_ids"][:, 0]
    assert abs((ids[:101] < 1000).sum() - 101 / 3) < 1
    assert (ids[101:] < 1000).sum() == 0
    assert stream.plan.counts(300)["b"] == (ids >= 1000).sum()


def test_fingerprint_tells_what_the_order_depends_on() -> None:
    _, stream = mixture({"a": 7, "b": 9})
    assert mixture({"b": 9, "a": 7})[1].fingerprint == stream.fingerprint
    # A limit says when to stop, not what comes before.
    allowed = mixture({"a": 7, "b": 9}, a={"max_repetitions": 99.0})[1]
    assert allowed.fingerprint == stream.fingerprint
    others = [
        mixture({"a": 8, "b": 9})[1],
        mixture({"a": 7, "c": 9})[1],
        mixture({"a": 7, "b": 9}, a={"ratio": 1.5})[1],
        mixture({"a": 7, "b": 9}, a={"max_tokens": 8})[1],
        mixture({"a": 7, "b": 9}, schedule=(RatioChangeConfig(at_tokens=99, ratios={"a": 0.1}),))[
            1
        ],
    ]
    assert len({stream.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert stream.identity()["a"] == "data numbers-0-7, share 1/3"
    assert others[3].identity()["a"] == "data numbers-0-7, 2 of 7 instances, share 1/3"
    assert others[4].identity()["b"].endswith("share 2/3, share 20/21 from token 100")


def test_a_later_change_of_ratios_leaves_the_past_as_it_was() -> None:
    before = mixture({"a": 7, "b": 9})[1]
    later = RatioChangeConfig(at_tokens=50 * SEQ, ratios={"c": 4.0})
    after = mixture({"a": 7, "b": 9, "c": 5}, c={"ratio": 0.0}, schedule=(later,))[1]
    assert before.identity(50) == after.identity(50)
    assert before.identity(51) != after.identity(51)
    positions = np.arange(50)
    assert np.array_equal(before.indices(positions), after.indices(positions))


def test_an_entry_of_the_schedule_that_changes_nothing_has_no_effect() -> None:
    ratios: list[dict[str, float]] = [{}, {"a": 1.0}, {"a": 3.0, "b": 6.0, "c": 9.0}]
    empty = [RatioChangeConfig(at_tokens=n * 7 * SEQ, ratios=r) for n, r in enumerate(ratios, 1)]
    sizes = {"a": 7, "b": 9, "c": 5}
    plain, empties = mixture(sizes)[1], mixture(sizes, schedule=tuple(empty))[1]
    assert empties.identity(90) == plain.identity(90)
    positions = np.arange(90)
    assert np.array_equal(empties.indices(positions), plain.indices(positions))
    assert len(empties.plan.segments) == 1


def test_a_corpus_that_is_in_the_mixture_twice_has_two_orders() -> None:
    config = mix_config("ab", a={"ratio": 1.0}, b={"ratio": 1.0})
    same = Numbered(50, 0)
    stream = MixedStream(config, {"a": same, "b": same}, seed=0, shuffle=True)
    found = stream.indices(np.arange(40))
    assert found[found < 50].tolist() != (found[found >= 50] - 50).tolist()


def test_limits_are_checked_before_the_run() -> None:
    _, stream = mixture({"a": 10, "b": 1000}, a={"max_repetitions": 4.0})
    check_limits(stream.plan, 120)
    with pytest.raises(ConfigError) as caught:
        check_limits(stream.plan, 240)
    assert str(caught.value) == (
        "dataset.mix: a breaks its limit of 4 repetitions: the run takes 320 tokens of it, 8 times "
        "the 40 there are; lower its share from 33.3333% to 16.6666% of the mixture (its ratio "
        "times 0.4), or train on at most 484 tokens (trainer.max_duration), or raise its "
        "max_repetitions"
    )
    check_limits(mixture({"a": 10, "b": 9}, a={"max_repetitions": 4.0, "ratio": 0.4})[1].plan, 240)


def test_the_longest_run_that_works_is_found_behind_changes_of_ratios() -> None:
    schedule = (RatioChangeConfig(at_tokens=60 * SEQ, ratios={"a": 6.0}),)
    _, stream = mixture({"a": 10, "b": 99}, a={"max_repetitions": 5.0}, schedule=schedule)
    # 20 of the first 60, then 3 of 4.
    end = next(t for t in range(200) if stream.plan.counts(t + 1)["a"] > 50)
    assert stream.end == end
    assert abs(end - 100) <= 1
    with pytest.raises(ConfigError, match=f"train on at most {end * SEQ} tokens"):
        check_limits(stream.plan, 110)
    check_limits(stream.plan, end)
    with pytest.raises(ConfigError, match=f"train on at most {end // 8 * 8 * SEQ} tokens"):
        check_limits(stream.plan, 110, batch_instances=8)


def test_a_source_that_stops_in_time_breaks_no_limit() -> None:
    schedule = (RatioChangeConfig(at_tokens=60 * SEQ, ratios={"a": 0.0}),)
    _, stream = mixture({"a": 10, "b": 99}, a={"max_repetitions": 2.0}, schedule=schedule)
    assert stream.end is None
    check_limits(stream.plan, 10**9)
    _, stream = mixture({"a": 10, "b": 99}, a={"max_repetitions": 1.9}, schedule=schedule)
    assert stream.end == 58


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_places_of_instances_are_found_without_reading(name: str) -> None:
    changes = (
        RatioChangeConfig(at_tokens=70 * SEQ, ratios={"a": 0.0, "c": 0.5}),
        RatioChangeConfig(at_tokens=200 * SEQ, ratios={"a": 7.0}),
    )
    _, stream = mixture({"a": 10, "b": 10, "c": 10}, schedule=changes)
    sources, ordinals = stream.plan.locate(np.arange(600))
    for place in np.flatnonzero(sources == "abc".index(name)).tolist():
        assert stream.plan.position_of(name, int(ordinals[place])) == place


def test_batches_up_to_a_limit_can_be_read_at_once() -> None:
    _, stream = mixture({"a": 10, "b": 99}, a={"max_repetitions": 1.5})
    order = StreamBatches(stream, [Segment(0, 0, 4)])
    assert stream.end == 46
    assert order.batches_in_segment(0, 64) == 11
    assert order.indices(0, 11).shape == (11, 4)
    assert order.batches_in_segment(11, 64) == 1
    with pytest.raises(DataError, match="a has been repeated"):
        order.indices(11, 1)


def test_reading_past_a_limit_is_an_error() -> None:
    _, stream = mixture({"a": 10, "b": 99}, a={"max_repetitions": 1.5})
    stream.indices(np.arange(45))
    with pytest.raises(DataError, match=r"a has been repeated .* 1\.5 allows \(15 instances\)"):
        stream.indices(np.arange(40, 60))


def test_a_source_without_one_instance_is_an_error() -> None:
    with pytest.raises(DataError, match=r"dataset\.mix: b has no training instance"):
        mixture({"a": 10, "b": 0})
