"""Whether a difference between two models is more than chance: intervals and tests on the same images.

correct_a, correct_b: bool [n], whether each model was right about each image, in one order. Scores may lie between: the share of an
image's corruptions under which the model was right.
"""

import math
from collections.abc import Mapping

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959963984540054  # the normal distribution's quantile of 0.975


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927): in [0, 1], sensible at 0 and 1 too. (0, 1) without images."""
    if not num_images:
        return 0.0, 1.0
    share, spread = num_correct / num_images, Z * Z / num_images
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """The chance of a difference as large where both are equally good: McNemar's exact two-sided test, in (0, 1].

    Only images that one of them alone gets right count: b's successes among n such are binomial with 1/2.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((~correct_a & correct_b).sum())
    total, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    # sum of C(total, k) / 2^total over k <= fewer, each term by logarithms: 50,000 images overflow a float
    logs = [_log_choose(total, k) - total * math.log(2) for k in range(fewer + 1)]
    largest = max(logs)
    return min(1.0, 2 * math.exp(largest + math.log(sum(math.exp(value - largest) for value in logs))))


def paired_bootstrap(
    scores_a: np.ndarray, scores_b: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % interval of b's mean score less a's, by drawing images with replacement (percentiles); in [-1, 1].

    scores: bool or float [n] in [0, 1], of the same images in one order.
    """
    drawn = _drawn_differences(scores_a, scores_b, seed, resamples)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_chance(scores_a: np.ndarray, scores_b: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Twice the share of the bootstrap's draws in which neither or the other model is better, in (0, 1].

    At least 2 / (resamples + 1): no number of draws shows that something never happens.
    """
    drawn = _drawn_differences(scores_a, scores_b, seed, resamples)
    against = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (against + 1) / (resamples + 1))


def _drawn_differences(scores_a: np.ndarray, scores_b: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Mean differences of redrawn images, float64 [resamples].

    Of each image only its difference counts, so a draw of n images is one of a multinomial over the differences there are:
    exact, and as fast for many images as for few.
    """
    difference = np.round(scores_b.astype(np.float64) - scores_a, 9)
    values, counts = np.unique(difference, return_counts=True)
    if not len(values):
        return np.zeros(resamples)
    total = len(difference)
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    return drawn @ values / total


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Chances of several tests, corrected for their number (Holm 1979): below 0.05 means that one was significant."""
    order = sorted(chances, key=lambda name: chances[name])
    corrected, largest = {}, 0.0
    for place, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * chances[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in chances}


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
