"""evaluate: top-1, top-5 and per-class accuracy of a model; the same code for teacher and student."""

from typing import Any

import numpy as np
import pyarrow as pa

from models.predictions import restore_probabilities
from storage.artifacts import FileEntry, Manifest, artifact_folder, publish_file
from storage.keys import Config
from storage.shards import read_index, read_tables, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.label import predict

VERSION = 2
TOP_K = 5
LEAST_CLASSES_FOR_TOP_5 = 11  # with ten classes or fewer, top-5 accuracy says nothing


class EvaluateConfig(Config):
    """Nothing to set yet: the validation and the test split, clean view."""


def evaluate(context: StageContext, config: EvaluateConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on the validation and test images of `inputs["data"]`."""
    data, names = inputs["data"], inputs["data"].metrics["class_names"]
    files: list[FileEntry] = []
    metrics: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for split, made in predict(context, inputs["model"], data, ("val", "test"), "evaluation").items():
        files += made
        probabilities, predicted = _read(context, made, len(names))
        labels = read_index(context.store, data, split, ["label"])["label"].to_numpy()
        measured = accuracy(labels, predicted, probabilities)
        metrics[split] = {name: measured[name] for name in ("top1", "top5", "images")}
        for number, name in enumerate(names):
            counts = {field: int(measured[field][number]) for field in ("class_images", "class_correct")}
            rows.append({"split": split, "label": number, "class_name": name, **counts})
    with context.store.staging() as folder:
        write_parquet(folder / "per_class.parquet", pa.Table.from_pylist(rows))
        place = artifact_folder("evaluation", context.key)
        files.append(publish_file(context.store, place, "per_class.parquet", folder / "per_class.parquet", len(rows)))
    return StageResult(tuple(files), metrics)


def accuracy(labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Top-1, top-5 (None with ten classes or fewer), and counts by class.

    labels, predicted: int [n]; probabilities: float [n, classes]. Ties in the top 5 go to the lower class index.
    """
    num_classes = probabilities.shape[1]
    correct = predicted == labels
    top5 = None
    if num_classes >= LEAST_CLASSES_FOR_TOP_5:
        best = np.argsort(-probabilities.astype(np.float32), axis=1, kind="stable")[:, :TOP_K]
        top5 = float((best == labels[:, None]).any(axis=1).mean())
    return {
        "images": len(labels),
        "top1": float(correct.mean()),
        "top5": top5,
        "class_images": np.bincount(labels, minlength=num_classes),
        "class_correct": np.bincount(labels[correct], minlength=num_classes),
    }


def _read(context: StageContext, files: tuple[FileEntry, ...], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, classes] and classes [n] of a split, from its files of both kinds."""
    tables = {
        kind: pa.concat_tables(read_tables(context.store, [entry for entry in files if entry.name.startswith(kind)]))
        for kind in ("predictions/", "probabilities/")
    }
    probabilities = restore_probabilities(tables["probabilities/"], num_classes)
    return probabilities, tables["predictions/"]["label"].to_numpy()
