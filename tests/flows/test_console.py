"""What is said of a stage's result."""

import pytest

from flows.console import describe
from storage.artifacts import Manifest
from tasks.stage import StageOutcome


@pytest.mark.parametrize(("kept", "said"), [([3, 2], "0 duplicated"), ([3, 0], "0 duplicated, 1 of 2 classes empty")])
def test_a_selection_says_how_many_classes_stay_empty(kept: list[int], said: str) -> None:
    metrics = {"kept": sum(kept), "dropped": 1, "duplicated": 0, "per_class": {"kept": kept}}
    manifest = Manifest(
        kind="selection", key="k", stage="select", stage_version=1, config={}, inputs={}, files=(), metrics=metrics
    )
    assert describe(StageOutcome(manifest, reused=True)).endswith(said)
