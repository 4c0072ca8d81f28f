"""ImageNet-P's measures: flip probability, mean flip rate (mFR) and top-5 distance of sequences of frames.

Hendrycks and Dietterich 2019, section 4.3 and its released evaluation. Perturbations that move on (brightness, rotate)
compare each frame with the one before; noise, which has no order, compares each with the first, the clean one.
"""

from collections.abc import Mapping

import numpy as np

from tasks.metrics.corruption import check_baseline

TOP_K = 5


def flip_probability(predicted: np.ndarray, from_first: bool, step: int = 1) -> float:
    """How often the top-1 differs from that of the frame it is compared with: the mean over sequences, in [0, 1].

    predicted: int [sequences, frames], at least step + 1 frames. `step`: frames between compared ones (the benchmark's
    difficulty); a noise sequence has none. Raises ValueError where nothing can be compared.
    """
    before, after = _compared(predicted.shape[1], from_first, step)
    return float((predicted[:, before] != predicted[:, after]).mean(axis=1).mean())


def top5_distance(ranked: np.ndarray, from_first: bool, step: int = 1) -> float:
    """How far the five likeliest classes of a frame move in the next one's ranking: a mean over sequences, in [0, 15].

    ranked: int [sequences, frames, 5], likeliest first. Of one pair it is the sum over i = 1..5 of |i - s(i)| where s(i) is the
    new rank of the class that was i-th, and 6 for all that left the first five (section 4.3; the released code's `dist`). With k
    < 5 classes ranked, the sum goes over these.
    """
    before, after = _compared(ranked.shape[1], from_first, step)
    old, new = ranked[:, before], ranked[:, after]  # [sequences, pairs, k]
    count = ranked.shape[2]
    same = old[..., :, None] == new[..., None, :]  # [sequences, pairs, old rank, new rank]
    rank = np.where(same.any(axis=-1), same.argmax(axis=-1), TOP_K)
    distances = np.abs(np.arange(count) - rank).sum(axis=-1)
    return float(distances.mean(axis=1).mean())


def flip_rates(flips: Mapping[str, float], baseline: Mapping[str, float], named: str) -> dict[str, float]:
    """The flip rate of each perturbation: its flip probability divided by that of the baseline model called `named`.

    Raises UserError where the baseline lacks a perturbation or never flips in it.
    """
    check_baseline(flips, baseline, named)
    return {kind: flip / baseline[kind] for kind, flip in flips.items()}


def mean_flip_rate(rates: Mapping[str, float]) -> float:
    """mFR in percent: 100 times the mean of the flip rates. The baseline's own is 100."""
    return 100.0 * float(np.mean(list(rates.values())))


def _compared(num_frames: int, from_first: bool, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Which frames are compared: int64 [pairs] each."""
    step = 1 if from_first else step
    if num_frames <= step:
        raise ValueError(f"a sequence of {num_frames} frames has none that is {step} after another")
    after = np.arange(1 if from_first else step, num_frames)
    return (np.zeros_like(after) if from_first else after - step), after
