from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo.data import DataError
from nemo.data.splits import hold_out, limit_to


@settings(deadline=None)  # a busy machine is no failure
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_stratified_and_repeatable(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    names = [f"class {label}" for label in range(len(counts))]
    kept, held = hold_out(labels, names, fraction, seed, "testing")
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        number = int((labels[held] == label).sum())
        assert 1 <= number < count
        assert abs(number - fraction * count) <= 1
    again = hold_out(labels, names, fraction, seed, "testing")
    assert np.array_equal(held, again[1])


def test_the_seed_matters() -> None:
    labels = np.zeros(50, dtype=np.int64)
    drawn = [tuple(hold_out(labels, ["a"], 0.2, seed, "testing")[1]) for seed in range(3)]
    assert len(set(drawn)) == 3


def test_the_draw_is_the_same_for_ever() -> None:
    labels = np.arange(20, dtype=np.int64) % 2
    assert hold_out(labels, ["a", "b"], 0.2, 0, "testing")[1].tolist() == [4, 7, 11, 16]


@pytest.mark.parametrize("count", [0, 1])
def test_a_class_too_small_to_split_is_named(count: int) -> None:
    labels = np.array([0] * 5 + [1] * count)
    message = f"class 'dog' has too few images to hold some out for testing: {count}; accepted: 2"
    with pytest.raises(DataError, match=message):
        hold_out(labels, ["cat", "dog"], 0.2, 0, "testing")


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=5),
    count=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_limit_leaves_each_class_its_share(counts: list[int], count: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if count < len(labels) and count * min(counts) < 2 * len(labels):
        with pytest.raises(DataError, match=r"images leave a class fewer than 2; accepted: \d+ or"):
            limit_to(labels, count, seed)
        return
    kept = limit_to(labels, count, seed)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == min(count, len(labels))
    for label, number in enumerate(counts):
        share = number * len(kept) / len(labels)
        assert abs(int((labels[kept] == label).sum()) - share) < 1


def test_a_limit_gives_what_is_left_over_to_the_largest_remainders() -> None:
    labels = np.repeat([0, 1, 2], [5, 3, 2])  # shares of 7: 3.5, 2.1 and 1.4, but 2 are needed
    with pytest.raises(
        DataError, match="7 images leave a class fewer than 2; accepted: 10 or more"
    ):
        limit_to(labels, 7, 0)
    labels = np.repeat([0, 1, 2], [16, 13, 11])  # shares of 10: 4, 3.25 and 2.75
    assert np.bincount(labels[limit_to(labels, 10, 0)]).tolist() == [4, 3, 3]
    drawn = {tuple(limit_to(labels, 10, seed)) for seed in range(3)}
    assert len(drawn) == 3
