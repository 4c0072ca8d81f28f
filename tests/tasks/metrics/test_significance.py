"""Intervals and tests on cases worked out by hand, and against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tasks.metrics.significance import bootstrap_chance, holm, mcnemar, paired_bootstrap, wilson_interval


def right(pattern: str) -> np.ndarray:
    return np.array([sign == "1" for sign in pattern])


def test_mcnemar_by_hand() -> None:
    """One image only A gets, five only B: 2 x (1 + 6) / 64."""
    assert mcnemar(right("1000001"), right("0111111")) == pytest.approx(2 * 7 / 64)


def test_equally_many_images_won_and_lost_are_no_sign_of_a_difference() -> None:
    assert mcnemar(right("1100"), right("0011")) == 1
    assert mcnemar(right("11"), right("11")) == 1


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_scipys_exact_binomial_test(only_a: int, only_b: int) -> None:
    a = np.repeat([True, False, True], [only_a, only_b, 5])
    b = np.repeat([False, True, True], [only_a, only_b, 5])
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_fifty_thousand_images_do_not_overflow() -> None:
    a, b = np.zeros(50_000, bool), np.zeros(50_000, bool)
    a[:20_000], b[20_000:41_000] = True, True
    assert 0 < mcnemar(a, b) < 1e-5


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilsons_interval_is_scipys(num_images: int, share: float) -> None:
    num_correct = round(share * num_images)
    expected = stats.binomtest(num_correct, num_images).proportion_ci(0.95, "wilson")
    assert wilson_interval(num_correct, num_images) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_bootstrap_interval_holds_the_difference_and_has_the_binomials_width() -> None:
    """300 images only B gets, 100 only A, of 1,000: .2 +- 1.96 sqrt((.4 - .04) / 1000)."""
    a = np.repeat([True, False, True], [100, 300, 600])
    b = np.repeat([False, True, True], [100, 300, 600])
    low, high = paired_bootstrap(a, b)
    assert (low, high) == pytest.approx((0.2 - 0.0372, 0.2 + 0.0372), abs=0.004)
    assert paired_bootstrap(a, b) == (low, high), "seeded"


def test_the_same_predictions_differ_by_nothing() -> None:
    assert paired_bootstrap(right("1010"), right("1010")) == (0, 0)


def test_scores_between_right_and_wrong_have_an_interval_of_their_own_width() -> None:
    """Of 1,000 images 400 gain .5, 200 lose .25: mean .15, variance .4 x .25 + .2 x .0625 - .15^2 = .09."""
    a = np.repeat([0.25, 0.5, 0.75], [400, 200, 400])
    b = np.repeat([0.75, 0.25, 0.75], [400, 200, 400])
    half = 1.96 * (0.09 / 1000) ** 0.5
    assert paired_bootstrap(a, b) == pytest.approx((0.15 - half, 0.15 + half), abs=0.002)


def test_the_bootstraps_chance_is_near_mcnemars_and_never_zero() -> None:
    a = np.repeat([True, False, True], [40, 60, 900])
    b = np.repeat([False, True, True], [40, 60, 900])
    assert bootstrap_chance(a, b) == pytest.approx(mcnemar(a, b), abs=0.02)
    assert bootstrap_chance(right("1010"), right("1010")) == 1
    assert bootstrap_chance(np.zeros(500), np.ones(500)) == pytest.approx(2 / 2001)
    assert bootstrap_chance(a, b) == bootstrap_chance(a, b), "seeded"


def test_holm_by_hand() -> None:
    """.01 x 3, .03 x 2, and .04 not below that."""
    assert holm({"b": 0.03, "c": 0.04, "a": 0.01}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
