"""Flip probability, mFR and top-5 distance on cases worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import UserError
from tasks.metrics.perturbation import flip_probability, flip_rates, mean_flip_rate, top5_distance


@pytest.mark.parametrize("from_first", [True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_a_constant_classifier_never_flips(from_first: bool, step: int) -> None:
    assert flip_probability(np.full((3, 7), 4), from_first, step) == 0


def test_flips_against_the_previous_and_against_the_first_frame() -> None:
    """1 1 2 1: against the previous one the third and the fourth flip, against the first one the third alone."""
    frames = np.array([[1, 1, 2, 1]])
    assert flip_probability(frames, from_first=False) == pytest.approx(2 / 3)
    assert flip_probability(frames, from_first=True) == pytest.approx(1 / 3)


def test_difficulty_two_compares_every_second_frame() -> None:
    """1 2 1 2: each frame has another class than the one before, and the same as the one before that."""
    frames = np.array([[1, 2, 1, 2]])
    assert flip_probability(frames, from_first=False, step=1) == 1
    assert flip_probability(frames, from_first=False, step=2) == 0


def test_noise_ignores_the_difficulty() -> None:
    """Its harder forms are other files: kind_2 and kind_3."""
    frames = np.array([[1, 2, 1]])
    assert flip_probability(frames, from_first=True, step=2) == 0.5


def test_sequences_weigh_the_same() -> None:
    assert flip_probability(np.array([[1, 2, 1], [1, 1, 1]]), from_first=False) == 0.5


def test_one_frame_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="1 frames"):
        flip_probability(np.array([[1]]), from_first=False)


@pytest.mark.parametrize(
    ("after", "distance"),
    [
        ((0, 1, 2, 3, 4), 0),  # nothing moves
        ((1, 0, 2, 3, 4), 2),  # two neighbors change places: 1 + 1
        ((4, 1, 2, 3, 0), 8),  # the first and the fifth: 4 + 4
        ((5, 1, 2, 3, 4), 5),  # the first leaves: it counts as the sixth
        ((0, 1, 2, 3, 9), 1),  # the fifth leaves
        ((5, 6, 7, 8, 9), 15),  # all leave: 5 + 4 + 3 + 2 + 1
    ],
)
def test_top5_distances_by_hand(after: tuple[int, ...], distance: int) -> None:
    ranked = np.array([[(0, 1, 2, 3, 4), after]])
    assert top5_distance(ranked, from_first=False) == distance


@given(st.permutations(range(12)), st.permutations(range(12)))
def test_the_distance_is_that_of_the_papers_double_sum(before: list[int], after: list[int]) -> None:
    """Section 4.3: over i = 1..5, and j from min(i, s) + 1 to max(i, s), the number of j with 1 <= j - 1 <= 5."""
    expected = 0
    for i in range(1, 6):
        s = after.index(before[i - 1]) + 1
        expected += sum(1 <= j - 1 <= 5 for j in range(min(i, s) + 1, max(i, s) + 1))
    ranked = np.array([[before[:5], after[:5]]])
    assert top5_distance(ranked, from_first=False) == expected


def test_a_baselines_own_mean_flip_rate_is_100() -> None:
    flips = {"tilt": 0.2, "snow": 0.05}
    assert mean_flip_rate(flip_rates(flips, flips, "itself")) == pytest.approx(100)


def test_half_the_flips_are_a_rate_of_50() -> None:
    assert mean_flip_rate(flip_rates({"tilt": 0.1}, {"tilt": 0.2}, "AlexNet")) == pytest.approx(50)


def test_a_baseline_without_the_perturbation_is_refused() -> None:
    with pytest.raises(UserError, match="AlexNet was not evaluated on tilt"):
        flip_rates({"tilt": 0.1}, {"snow": 0.2}, "AlexNet")
