"""Accuracy on cases worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.metrics.classification import accuracy, confusion, hits, ranked_classes, real_accuracy


def rows(num_classes: int, *probabilities: dict[int, float]) -> np.ndarray:
    """Rows of these probabilities; what is left over is spread evenly over the other classes."""
    found = np.zeros((len(probabilities), num_classes), np.float16)
    for row, named in zip(found, probabilities, strict=True):
        row[:] = (1 - sum(named.values())) / (num_classes - len(named))
        for number, value in named.items():
            row[number] = value
    return found


def test_three_images_two_right() -> None:
    probabilities = rows(3, {0: 0.9}, {1: 0.6}, {2: 0.8})
    found = accuracy(np.array([0, 1, 1]), np.array([0, 1, 2]), probabilities)
    assert found["images"] == 3
    assert found["top1"] == pytest.approx(2 / 3)
    assert list(found["class_images"]) == [1, 2, 0]
    assert list(found["class_correct"]) == [1, 1, 0]


def test_top5_of_twelve_classes_counts_the_five_most_probable() -> None:
    ranked = {3: 0.3, 7: 0.2, 1: 0.15, 11: 0.12, 5: 0.1, 0: 0.08}  # 0 is the sixth
    probabilities = rows(12, ranked, ranked, ranked, ranked)
    found = accuracy(np.array([3, 5, 0, 2]), np.array([3, 3, 3, 3]), probabilities)
    assert found["top1"] == 0.25
    assert found["top5"] == 0.5


@pytest.mark.parametrize(("label", "top5"), [(0, 1.0), (4, 1.0), (5, 0.0), (11, 0.0)])
def test_ties_in_the_top_five_go_to_the_lower_class(label: int, top5: float) -> None:
    """A network that has learned nothing must not get every image right."""
    probabilities = np.full((1, 12), 1 / 12, np.float16)
    assert accuracy(np.array([label]), np.array([0]), probabilities)["top5"] == top5


def test_a_tie_at_the_fifth_place_goes_to_the_lower_class() -> None:
    ranked = {11: 0.3, 10: 0.2, 9: 0.15, 8: 0.13, 2: 0.06, 6: 0.06}
    found = accuracy(np.array([2, 6]), np.array([11, 11]), rows(12, ranked, ranked))
    assert found["top5"] == 0.5


def test_top1_follows_the_prediction_before_rounding_not_the_rounded_probabilities() -> None:
    """Two float32 probabilities may be one in fp16; the stored argmax was taken before."""
    probabilities = np.full((1, 2), 0.5, np.float16)
    assert accuracy(np.array([1]), np.array([1]), probabilities)["top1"] == 1.0


@pytest.mark.parametrize(("num_classes", "measured"), [(10, False), (11, True)])
def test_top5_is_not_reported_for_ten_classes_or_fewer(num_classes: int, measured: bool) -> None:
    found = accuracy(np.array([0]), np.array([0]), rows(num_classes, {0: 0.9}))
    assert (found["top5"] is not None) == measured


def test_a_confusion_of_three_images_by_hand() -> None:
    found = confusion(np.array([0, 1, 1]), np.array([0, 2, 1]), 3)
    assert found.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_rows_of_a_confusion_are_the_classes_images_and_its_diagonal_what_was_right(
    pairs: list[tuple[int, int]],
) -> None:
    labels, predicted = np.array(pairs).T
    found = confusion(labels, predicted, 5)
    assert found.sum(axis=1).tolist() == np.bincount(labels, minlength=5).tolist()
    assert found.sum(axis=0).tolist() == np.bincount(predicted, minlength=5).tolist()
    assert np.trace(found) == (labels == predicted).sum()


def test_fewer_classes_than_five_are_ranked_as_many_as_there_are() -> None:
    assert ranked_classes(np.array([[0.2, 0.5, 0.3]])).tolist() == [[1, 2, 0]]
    assert hits(np.array([0]), np.array([[1, 2]])).tolist() == [False]


def test_an_image_with_several_right_labels_is_right_with_any_and_one_without_does_not_count() -> None:
    """Four images: one of two accepted, the only accepted, none of two, nothing accepted."""
    share, judged = real_accuracy(np.array([3, 1, 4, 0]), [{2, 3}, {1}, {5, 6}, set()])
    assert (share, judged) == (pytest.approx(2 / 3), 3)
    assert real_accuracy(np.array([0]), [[]]) == (None, 0)
