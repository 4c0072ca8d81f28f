"""The clean evaluation's tables agree with each other and with the predictions that it keeps."""

import numpy as np
import pytest

from models.predictions import read_predictions
from storage.errors import UserError
from storage.shards import read_index, read_table
from tests.tasks.evaluators.conftest import Subject
from tests.tasks.evaluators.evaluations import evaluate


def test_top1_calibration_and_confusion_are_those_of_the_kept_predictions(tested: Subject) -> None:
    made = evaluate(tested.store, "clean", tested.inputs)
    predictions = read_predictions(tested.store, made)
    labels = np.concatenate(
        [read_index(tested.store, tested.data, s, ["label"])["label"].to_numpy() for s in ("test", "val")]
    )  # files are in the order of their names
    right = predictions["label"].to_numpy() == labels
    num_test = made.metrics["test"]["images"]
    assert (num_test, made.metrics["val"]["images"]) == (8, 24)
    assert made.metrics["test"]["top1"] == pytest.approx(right[:num_test].mean())
    assert made.metrics["val"]["top1"] == pytest.approx(right[num_test:].mean())
    confusion = read_table(tested.store, made.file("confusion.parquet")).to_pylist()
    per_class = read_table(tested.store, made.file("per_class.parquet")).to_pylist()
    bins = read_table(tested.store, made.file("reliability.parquet")).to_pylist()
    for split, images in (("val", 24), ("test", 8)):
        own = [row for row in confusion if row["split"] == split]
        assert sum(row["images"] for row in own) == images
        diagonal = sum(row["images"] for row in own if row["label"] == row["predicted"])
        assert diagonal / images == pytest.approx(made.metrics[split]["top1"])
        for row in (row for row in per_class if row["split"] == split):
            assert row["class_predicted"] == sum(r["images"] for r in own if r["predicted"] == row["label"])
            assert row["class_images"] == sum(r["images"] for r in own if r["label"] == row["label"])
        shown = [row for row in bins if row["split"] == split]
        assert sum(row["images"] for row in shown) == images
        gaps = sum(abs(r["accuracy"] - r["confidence"]) * r["images"] for r in shown if r["images"])
        assert made.metrics[split]["ece"] == pytest.approx(gaps / images)


def test_a_data_set_of_other_classes_is_refused(tested: Subject) -> None:
    other = tested.data.model_copy(update={"metrics": {**tested.data.metrics, "class_names": ["a", "b", "c", "d"]}})
    with pytest.raises(UserError, match="does not know, 4 of 4"):
        evaluate(tested.store, "clean", {**tested.inputs, "data": other})
