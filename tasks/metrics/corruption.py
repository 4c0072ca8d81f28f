"""ImageNet-C's measures: mean error of each corruption, corruption error (CE) against a baseline, and mCE.

Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations",
section 4.2. CE is a ratio of means over the severities, not a mean of ratios.
"""

from collections.abc import Mapping

import numpy as np

from storage.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)
# Mean error of AlexNet over the five severities of ImageNet-C, as in the benchmark's released evaluation.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
KINDS = tuple(ALEXNET)


def mean_errors(errors: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The mean error of each corruption over its severities; errors in [0, 1] by kind and severity."""
    return {kind: float(np.mean(list(by_severity.values()))) for kind, by_severity in errors.items()}


def corruption_errors(
    errors: Mapping[str, Mapping[int, float]], baseline: Mapping[str, float] = ALEXNET, named: str = "AlexNet"
) -> dict[str, float]:
    """CE of each corruption: its mean error over severities 1 to 5, divided by the baseline's.

    `baseline`: mean errors over the same severities, of the model called `named`. Raises UserError where a severity is
    missing, or the baseline lacks a corruption or makes no error in it.
    """
    for kind, by_severity in errors.items():
        missing = sorted(set(SEVERITIES) - set(by_severity))
        if missing:
            raise UserError(
                f"{kind}: severity {', '.join(map(str, missing))} is missing, and a corruption error is a mean over all "
                f"five; evaluate severities {', '.join(map(str, SEVERITIES))}"
            )
    check_baseline(errors, baseline, named)
    return {kind: error / baseline[kind] for kind, error in mean_errors(errors).items()}


def check_baseline(kinds: Mapping[str, object], baseline: Mapping[str, float], named: str) -> None:
    """Raise UserError where a baseline has no error (or a zero) of one of the kinds that are to be divided by it."""
    missing = [kind for kind in kinds if kind not in baseline]
    if missing:
        raise UserError(
            f"the baseline {named} was not evaluated on {', '.join(missing)}; evaluate it with the same kinds, or leave "
            "those out here"
        )
    perfect = [kind for kind in kinds if baseline[kind] <= 0]
    if perfect:
        raise UserError(
            f"the baseline {named} has 0 of {', '.join(perfect)}, by which nothing can be divided; choose another baseline"
        )


def mean_corruption_error(ces: Mapping[str, float]) -> float:
    """mCE in percent: 100 times the mean of the corruption errors. AlexNet's own is 100."""
    return 100.0 * float(np.mean(list(ces.values())))
