"""CE and mCE on cases worked out by hand."""

import pytest

from storage.errors import UserError
from tasks.metrics.corruption import (
    ALEXNET,
    KINDS,
    SEVERITIES,
    corruption_errors,
    mean_corruption_error,
    mean_errors,
)

ALEXNET_ERRORS = {kind: dict.fromkeys(SEVERITIES, error) for kind, error in ALEXNET.items()}


def test_alexnets_mce_against_itself_is_100() -> None:
    assert mean_corruption_error(corruption_errors(ALEXNET_ERRORS)) == pytest.approx(100)


def test_there_are_fifteen_kinds() -> None:
    assert len(KINDS) == 15


def test_a_corruption_error_is_a_ratio_of_means_not_a_mean_of_ratios() -> None:
    """Errors .1 to .5 have the mean .3; a baseline of .6 makes .5."""
    errors = {"fog": {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}}
    assert mean_errors(errors) == pytest.approx({"fog": 0.3})
    assert corruption_errors(errors, {"fog": 0.6}, "ours") == pytest.approx({"fog": 0.5})


def test_mce_is_the_mean_over_kinds_in_percent() -> None:
    assert mean_corruption_error({"fog": 0.5, "snow": 1.0}) == pytest.approx(75)


def test_a_missing_severity_is_refused_and_named() -> None:
    with pytest.raises(UserError, match=r"fog: severity 2, 4 is missing.*evaluate severities 1, 2, 3, 4, 5"):
        corruption_errors({"fog": {1: 0.1, 3: 0.1, 5: 0.1}})


@pytest.mark.parametrize(
    ("baseline", "told"), [({"snow": 0.5}, "ours was not evaluated on fog"), ({"fog": 0.0}, "ours has 0 of fog")]
)
def test_a_baseline_without_the_corruption_is_refused(baseline: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        corruption_errors({"fog": dict.fromkeys(SEVERITIES, 0.5)}, baseline, "ours")
