import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.order.stream import KeyedPermutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.text(max_size=20))
def test_every_index_appears_exactly_once(size: int, key: str) -> None:
    permuted = KeyedPermutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(permuted), np.arange(size))


def test_one_index_is_computed_without_the_others() -> None:
    permutation = KeyedPermutation(10**12, "key")
    positions = np.array([0, 10**12 - 1, 123_456_789_012])
    together = permutation(positions)
    assert [int(permutation(np.array([p]))[0]) for p in positions] == together.tolist()
    assert together.min() >= 0
    assert together.max() < 10**12


def test_other_keys_give_unrelated_orders() -> None:
    size = 10_000
    first = KeyedPermutation(size, "a")(np.arange(size))
    second = KeyedPermutation(size, "b")(np.arange(size))
    # Two random permutations agree in 1 place on average (Poisson).
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.05


def test_any_prefix_covers_the_range_evenly() -> None:
    size, prefix, bins = 1_000_000, 20_000, 20
    drawn = KeyedPermutation(size, "even")(np.arange(prefix))
    counts = np.histogram(drawn, bins=bins, range=(0, size))[0]
    chi_square = ((counts - prefix / bins) ** 2 / (prefix / bins)).sum()
    assert chi_square < 43.8  # 0.1% point of chi-square with 19 degrees of freedom


def test_small_sets_reach_every_order() -> None:
    orders = {tuple(KeyedPermutation(3, f"key {i}")(np.arange(3))) for i in range(300)}
    assert len(orders) == 6
