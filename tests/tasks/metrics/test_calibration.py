"""Reliability and ECE on cases worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.metrics.calibration import reliability


def test_four_images_in_two_bins_by_hand() -> None:
    """Half of .6 and .8 right: |.5 - .7| = .2; both of .1 and .3 wrong: |0 - .2| = .2; so .2 in all."""
    found = reliability(np.array([0.6, 0.8, 0.1, 0.3]), np.array([True, False, False, False]), num_bins=2)
    assert found.images.tolist() == [2, 2]
    assert found.confidence.tolist() == pytest.approx([0.2, 0.7])
    assert found.accuracy.tolist() == pytest.approx([0.0, 0.5])
    assert found.expected_calibration_error == pytest.approx(0.2)


def test_bins_weigh_by_their_images() -> None:
    """Three sure and right (gap 0), one of .5 and wrong (gap .5): .5 / 4."""
    found = reliability(np.array([1.0, 1.0, 1.0, 0.5]), np.array([True, True, True, False]))
    assert found.expected_calibration_error == pytest.approx(0.125)


def test_an_edge_belongs_to_the_bin_below_and_zero_to_the_first() -> None:
    found = reliability(np.array([0.0, 0.2, 0.2000001, 1.0]), np.zeros(4, bool), num_bins=5)
    assert found.images.tolist() == [2, 1, 0, 0, 1]


def test_empty_bins_have_no_accuracy_and_no_weight() -> None:
    found = reliability(np.array([0.9]), np.array([True]), num_bins=2)
    assert np.isnan(found.accuracy[0])
    assert found.expected_calibration_error == pytest.approx(0.1)
    assert reliability(np.zeros(0), np.zeros(0, bool)).expected_calibration_error == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1), st.integers(1, 20))
def test_the_error_is_between_the_gap_of_all_and_one(rows: list[tuple[float, bool]], num_bins: int) -> None:
    """By the triangle inequality bins can only show more than the mean confidence and the accuracy of all do."""
    confidence, correct = np.array([c for c, _ in rows]), np.array([right for _, right in rows])
    found = reliability(confidence, correct, num_bins)
    assert found.images.sum() == len(rows)
    assert abs(confidence.mean() - correct.mean()) - 1e-9 <= found.expected_calibration_error <= 1
