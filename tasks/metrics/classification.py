"""How often a classifier is right: top-1, top-5, by class, by pair of classes, and against several right labels."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

TOP_K = 5
LEAST_CLASSES_FOR_TOP_5 = 11  # with ten classes or fewer, top-5 accuracy says nothing


def accuracy(labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Top-1, top-5 (None with ten classes or fewer), and counts by class.

    labels, predicted: int [n]; probabilities: float [n, classes]. Ties in the top 5 go to the lower class index.
    """
    num_classes = probabilities.shape[1]
    correct = predicted == labels
    top5 = None
    if num_classes >= LEAST_CLASSES_FOR_TOP_5:
        top5 = float(hits(labels, ranked_classes(probabilities)).mean())
    return {
        "images": len(labels),
        "top1": float(correct.mean()),
        "top5": top5,
        "class_images": np.bincount(labels, minlength=num_classes),
        "class_correct": np.bincount(labels[correct], minlength=num_classes),
    }


def ranked_classes(scores: np.ndarray, most: int = TOP_K) -> np.ndarray:
    """The `most` classes with the highest scores (float [n, classes]), the highest first: int64 [n, most or classes].

    Ties go to the lower class index: a network that has learned nothing must not get every image right.
    """
    return np.argsort(-scores.astype(np.float32), axis=1, kind="stable")[:, :most]


def hits(labels: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Whether each label (int [n]) is among the classes that were named for its image (int [n, k]): bool [n]."""
    found: np.ndarray = (ranked == labels[:, None]).any(axis=1)
    return found


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (row) were taken for each class (column): int64 [classes, classes].

    labels, predicted: int [n] in [0, num_classes).
    """
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def real_accuracy(predicted: np.ndarray, accepted: Sequence[Collection[int]]) -> tuple[float | None, int]:
    """The share of images whose predicted class is one of those accepted for it, and of how many images.

    predicted: int [n]; `accepted`: of each image the classes that are right. Images without any do not count (Beyer et
    al. 2020, "Are we done with ImageNet?", section 3). None where none is left.
    """
    judged = [int(guess) in right for guess, right in zip(predicted, accepted, strict=True) if len(right)]
    return (sum(judged) / len(judged) if judged else None), len(judged)
