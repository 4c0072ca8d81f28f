"""Several right labels an image: ReaL's list, names of files, and files that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from storage.errors import UserError
from tasks.evaluators.real_labels import RealLabels
from tests.tasks.evaluators.conftest import Subject
from tests.tasks.evaluators.evaluations import evaluate

CLASSES = ("cat", "dog", "owl")


def labels(folder: Path, content: Any) -> RealLabels:
    (folder / "real.json").write_text(json.dumps(content))
    return RealLabels(str(folder / "real.json"), CLASSES)


def test_reals_list_counts_validation_images_from_one(tmp_path: Path) -> None:
    real = labels(tmp_path, [[0], [1, 2], []])
    sources = [f"val/n01/ILSVRC2012_val_{n:08d}.JPEG" for n in (2, 3, 1, 4)]
    assert real.of(sources) == [{1, 2}, set(), {0}, set()]


def test_files_are_named_without_folder_and_ending_and_classes_by_number_or_name(tmp_path: Path) -> None:
    real = labels(tmp_path, {"a": ["dog", 2], "b": [0]})
    assert real.of(["x/a.png", "val.parquet:x/b.jpg", "c.jpg"]) == [{1, 2}, {0}, set()]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"z": [0]}, r"names none of the 1 images \(the first: 'a.png'\)"),
        ({"a": ["yak"]}, "'yak' is no class of this data set's 3"),
        ({"a": [3]}, "3 is no class"),
        ("cat", "neither a list .* nor maps"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        labels(tmp_path, content).of(["a.png"])


def test_an_image_is_right_with_any_of_its_labels(tested: Subject, tmp_path: Path) -> None:
    """Images of both splits are called 0.png, 1.png and so on: every second accepts all classes, the others none."""
    accepted = {str(number): [0, 1, 2, 3] if number % 2 else [] for number in range(24)}
    (tmp_path / "real.json").write_text(json.dumps(accepted))
    made = evaluate(tested.store, "clean", tested.inputs, real_labels=str(tmp_path / "real.json"))
    for split, judged in (("test", 4), ("val", 12)):
        assert (made.metrics[split]["real_top1"], made.metrics[split]["real_images"]) == (1.0, judged)
    assert made.metrics["val"]["images"] == 24
