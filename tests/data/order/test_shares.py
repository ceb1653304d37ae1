"""Shares are exact at every prefix, wherever one looks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.order.shares import ScheduledShares, Shares

EXTREME = [Fraction(1), Fraction("0.0007"), Fraction("0.00031")]
FIFTY = [Fraction(str(1 / (i + 1.37))) for i in range(50)]
# Rounding to the largest remainders at the ends of blocks has no order for shares of this kind.
TIGHT = [Fraction(45, 100), Fraction(45, 100), *[Fraction(1, 30)] * 3]


def worst_deviation(ratios: list[Fraction], first_block: int, num_blocks: int) -> Fraction:
    """max |count - share * t| over all sources and prefixes that end in the blocks."""
    shares = Shares(ratios)
    first = first_block * shares.block_size
    positions = np.arange(first, first + num_blocks * shares.block_size)
    sources, ordinals = shares.locate(positions)
    before, end = shares.counts(first), int(positions[-1]) + 1
    assert before.sum() == first
    worst = Fraction(0)
    for source, ratio in enumerate(ratios):
        share = ratio / sum(ratios)
        places = positions[sources == source]
        assert np.array_equal(ordinals[sources == source], before[source] + np.arange(len(places)))
        count = int(before[source]) + len(places)
        assert shares.counts(end)[source] == count
        # A source is furthest behind just before it comes, and furthest ahead just after.
        t, k = places.astype(object), ordinals[sources == source].astype(object)
        behind = share.numerator * t - share.denominator * k
        ahead = share.denominator * (k + 1) - share.numerator * (t + 1)
        most = max([0, *abs(behind).tolist(), *abs(ahead).tolist()])
        worst = max(worst, Fraction(most, share.denominator), abs(count - share * end))
    return worst


@pytest.mark.parametrize(
    "ratios",
    [
        [Fraction(1)],
        [Fraction(1)] * 2,
        [Fraction(1)] * 7,
        [Fraction("0.5"), Fraction("0.3"), Fraction("0.2")],
        [Fraction(str(2**0.5)), Fraction(str(np.pi)), Fraction("0.1")],
        [Fraction("0.1"), Fraction(0), Fraction("0.9")],
        EXTREME,
        FIFTY,
        TIGHT,
    ],
    ids=lambda ratios: f"{len(ratios)}-{float(ratios[-1]):.4g}",
)
@pytest.mark.parametrize("first_block", [0, 1, 999_999_937])
def test_every_prefix_is_within_one_instance(ratios: list[Fraction], first_block: int) -> None:
    assert worst_deviation(ratios, first_block, num_blocks=3) < 1


ratio = st.one_of(
    st.integers(1, 30).map(Fraction),
    st.floats(1e-3, 1.0).map(lambda value: Fraction(str(value))),
    st.integers(1, 999).map(lambda value: Fraction(value, 1000)),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ratio, min_size=1, max_size=12), st.integers(0, 10**9))
def test_every_prefix_is_within_one_instance_for_any_ratios(
    ratios: list[Fraction], first_block: int
) -> None:
    assert worst_deviation(ratios, first_block, num_blocks=2) < 1


def test_every_prefix_is_within_one_instance_with_shares_hard_to_round() -> None:
    generator = np.random.default_rng(3)
    for _ in range(25):
        small = [Fraction(int(value)) for value in generator.integers(1, 1000, 5)]
        ratios = [Fraction(9, 20), Fraction(9, 20), *(r / sum(small) / 10 for r in small)]
        assert worst_deviation(ratios, int(generator.integers(10**6)), num_blocks=2) < 1


def test_a_share_of_one_in_a_million_comes_once_in_a_million() -> None:
    shares = Shares([Fraction("0.999999"), Fraction("0.000001")])
    places = [shares.counts(position)[1] for position in (0, 10**6, 2 * 10**6)]
    assert places == [0, 1, 2]
    sources, ordinals = shares.locate(np.arange(10**6, 2 * 10**6))
    assert sources.sum() == 1
    assert ordinals[sources == 1].tolist() == [1]


def test_a_share_too_small_to_find_is_refused() -> None:
    with pytest.raises(ValueError, match="the smallest share is below 1 in 1000000"):
        Shares([Fraction(1), Fraction(1, 10**6)])


def test_counts_look_at_few_positions_however_small_a_share_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = Shares([Fraction(3), Fraction(1), Fraction(1, 5000)])
    assert shares.block_size == 20001
    sources, _ = shares.locate(np.arange(2 * shares.block_size))
    looked_at = []
    count = np.bincount

    def spy(values: np.ndarray, **options: int) -> np.ndarray:
        looked_at.append(len(values))
        return count(values, **options)

    monkeypatch.setattr(np, "bincount", spy)
    found = [shares.counts(position) for position in range(20, 2 * shares.block_size, 37)]
    assert max(looked_at) < 1024
    expected = [count(sources[:end], minlength=3) for end in range(20, 2 * shares.block_size, 37)]
    assert np.array_equal(found, expected)


def test_any_position_in_any_order_gives_the_same_as_reading_all() -> None:
    ratios = FIFTY[:9]
    positions = np.arange(20_000)
    sources, ordinals = Shares(ratios).locate(positions)
    shares, generator = Shares(ratios), np.random.default_rng(0)
    for _ in range(50):
        some = np.sort(generator.choice(positions, 40, replace=False))
        found = shares.locate(some)
        assert np.array_equal(found[0], sources[some])
        assert np.array_equal(found[1], ordinals[some])
    for position in (0, 1, 1023, 1024, 1025, 19_999):
        expected = np.bincount(sources[:position], minlength=9)
        assert np.array_equal(shares.counts(position), expected)


def test_no_positions_give_no_sources() -> None:
    none = np.arange(0)
    assert [len(part) for part in Shares([Fraction(1)]).locate(none)] == [0, 0]
    assert [len(part) for part in ScheduledShares([(0, [Fraction(1)])]).locate(none)] == [0, 0]


def test_equal_shares_take_turns() -> None:
    sources, _ = Shares([Fraction(1)] * 3).locate(np.arange(9))
    assert sources.reshape(3, 3).tolist() == [[0, 1, 2]] * 3


def test_ratios_change_at_their_positions() -> None:
    third, half = Fraction(1, 3), Fraction(1, 2)
    scheduled = ScheduledShares(
        [(0, [half, half, 0]), (1000, [third, third, third]), (5001, [Fraction(1), 0, 0])]
    )
    sources, ordinals = scheduled.locate(np.arange(6000))
    assert np.bincount(sources[:1000], minlength=3).tolist() == [500, 500, 0]
    for end in range(1000, 5001, 17):
        counts = np.bincount(sources[1000:end], minlength=3)
        assert np.abs(counts - (end - 1000) / 3).max() < 1
    assert set(sources[5001:].tolist()) == {0}
    for source in range(3):
        mine = ordinals[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))
    for position in (0, 999, 1000, 1001, 5000, 5001, 5999):
        expected = np.bincount(sources[:position], minlength=3)
        assert np.array_equal(scheduled.counts(position), expected)
    at = np.array([998, 1003, 5000, 5001])
    assert np.array_equal(scheduled.locate(at)[0], sources[at])
