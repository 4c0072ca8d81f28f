"""What the figures of the report and of the UI's pages say of themselves."""

from typing import Any

import pytest

from storage.artifacts import Manifest
from tasks.report_drawings import balance_drawing, confidence_drawing


def artifact(kind: str, config: dict[str, Any], **metrics: Any) -> Manifest:
    return Manifest(
        kind=kind, key="0" * 32, stage=kind, stage_version=1, config=config, inputs={}, files=(), metrics=metrics
    )


def selection(kept: list[int], **config: Any) -> Manifest:
    per_class = {"available": kept, "kept": kept, "copies": kept}
    names = [f"class {n}" for n in range(len(kept))]
    return artifact(
        "selection", config, class_names=names, per_class=per_class, kept=sum(kept), labeled=sum(kept), dropped=0
    )


@pytest.mark.parametrize(
    ("kept", "said"), [([3, 2], ""), ([3, 0], "1 class stayed empty."), ([0, 3, 0], "2 classes stayed empty.")]
)
def test_empty_classes_are_counted_in_good_english(kept: list[int], said: str) -> None:
    assert balance_drawing(selection(kept)).caption.partition("with copies.")[2].strip() == said


@pytest.mark.parametrize(("threshold", "named"), [(0.0, False), (0.5, True)])
def test_a_threshold_that_every_image_passes_is_neither_drawn_nor_named(threshold: float, named: bool) -> None:
    labels = artifact("labels", {}, confidence_histogram=[0, 3, 1, 0], mean_confidence=0.4)
    drawing = confidence_drawing(labels, selection([4], min_confidence=threshold))
    assert ("threshold" in drawing.alt) is named
    drawn, without = drawing.light, confidence_drawing(labels, None).light
    assert (drawn != without) is named
