"""How models fared on each single image: what pairs of models are tested on."""

from collections import defaultdict

import numpy as np
import pyarrow as pa

from storage.artifacts import FileEntry, Manifest, get
from storage.objects import Store
from storage.shards import read_index, read_tables
from tasks.evaluators.altered import classes_of, first_classes

SPLIT = "test"


def image_scores(store: Store, evaluation: Manifest) -> np.ndarray | None:
    """Of each image whether it is right, bool [n], or the share of its corruptions and severities under which it is, float64 [n].

    In an order of the images alone, so that those of two models on the same data are pairs. None of other evaluations.
    """
    if "errors" in evaluation.metrics:
        return _corrupted_scores(store, evaluation)
    found = correct_images(store, evaluation)
    return None if found is None else found[3]


def correct_images(store: Store, evaluation: Manifest) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray] | None:
    """Keys, labels, predicted classes [n] and whether they are right [n], of the images that top-1 is measured on.

    None where an evaluation has several predictions of an image.
    """
    if evaluation.stage == "evaluate":
        return _clean_images(store, evaluation)
    if evaluation.stage == "evaluate-subset":
        rows = pa.concat_tables(read_tables(store, evaluation.files_under("predictions/")))
        labels, predicted = rows["label"].to_numpy(), first_classes(rows)
        return rows["key"].to_pylist(), labels, predicted, labels == predicted
    return None


def _clean_images(store: Store, evaluation: Manifest) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray] | None:
    files = evaluation.files_under(f"predictions/{SPLIT}/")
    if not files:
        return None
    model = get(store, "model", evaluation.inputs["model"])
    data = get(store, "dataset", evaluation.inputs["data"])
    index = read_index(store, data, SPLIT, ["key", "label"])
    classes = np.array(classes_of(model, data.metrics["class_names"], "the data"))
    labels = classes[index["label"].to_numpy()]
    predicted = pa.concat_tables(read_tables(store, files, ["label"]))["label"].to_numpy()
    return index["key"].to_pylist(), labels, predicted, labels == predicted


def _corrupted_scores(store: Store, evaluation: Manifest) -> np.ndarray | None:
    """None where corruptions are not of the same images."""
    folders: dict[str, list[FileEntry]] = defaultdict(list)
    for entry in evaluation.files_under("predictions/"):
        folders[entry.name.rpartition("/")[0]].append(entry)
    images, right = None, []
    for files in folders.values():
        rows = pa.concat_tables(read_tables(store, files, ["key", "label", "top_classes"]))
        names = np.array([_image_of(key, evaluation.stage) for key in rows["key"].to_pylist()])
        order = np.argsort(names)
        if images is not None and not np.array_equal(names[order], images):
            return None
        images = names[order]
        right.append((first_classes(rows) == rows["label"].to_numpy())[order])
    return np.mean(right, axis=0)


def _image_of(key: str, stage: str) -> str:
    """What an image is called under every corruption: in an archive KIND/SEVERITY/CLASS/IMAGE its class and file."""
    return "/".join(key.split("/")[-2:]) if stage == "evaluate-imagenet-c" else key
