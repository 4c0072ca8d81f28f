"""Whether a classifier's confidence is worth believing: reliability by bins, and the expected calibration error."""

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15  # Guo et al. 2017, "On calibration of modern neural networks", section 5


@dataclass(frozen=True)
class Reliability:
    """Images in equal bins (low, high] of confidence: their number, mean confidence and accuracy (NaN in empty bins)."""

    edges: np.ndarray  # float64 [bins + 1], from 0 to 1
    images: np.ndarray  # int64 [bins]
    confidence: np.ndarray  # float64 [bins]
    accuracy: np.ndarray  # float64 [bins]

    @property
    def expected_calibration_error(self) -> float:
        """The mean distance of a bin's accuracy from its confidence, weighted by images; in [0, 1], 0 without images."""
        there = self.images > 0
        gaps = np.abs(self.accuracy[there] - self.confidence[there])
        return float((gaps * self.images[there]).sum() / max(1, self.images.sum()))


def reliability(confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """Bins of confidences (float [n] in [0, 1]) and of whether each prediction was right (bool [n])."""
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    images = np.bincount(place, minlength=num_bins)
    divisor = np.where(images > 0, images, np.nan)
    sums = np.bincount(place, weights=confidence.astype(np.float64), minlength=num_bins)
    right = np.bincount(place, weights=correct.astype(np.float64), minlength=num_bins)
    return Reliability(edges, images, sums / divisor, right / divisor)
