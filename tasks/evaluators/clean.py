"""evaluate: how often a model is right on clean images, and whether its confidence is worth believing.

Top-1 and top-5, by class, the confusion of classes, and the expected calibration error with its reliability diagram;
at will against several right labels an image. The same code for teacher and student.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from models.predictions import restore_probabilities
from storage.artifacts import FileEntry, Manifest, artifact_folder, publish_file
from storage.errors import UserError
from storage.keys import digest, file_sha256
from storage.shards import read_index, read_tables, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import classes_of
from tasks.evaluators.contract import EvaluatorConfig, Headline
from tasks.evaluators.real_labels import RealLabels
from tasks.label import predict
from tasks.metrics.calibration import reliability
from tasks.metrics.classification import accuracy, confusion, real_accuracy

VERSION = 3  # 3: confusion, calibration
SPLITS = ("val", "test")

Row = dict[str, Any]


class CleanConfig(EvaluatorConfig):
    """The validation and the test split, clean view; at will several right labels an image."""

    not_in_key: ClassVar[tuple[str, ...]] = ("real_labels",)

    real_labels: str = Field("", description="JSON file of all right classes an image: ReaL's list, or by file name")

    def external(self) -> str:
        """The file of right labels."""
        return f"real labels:{self.real_labels}" if self.real_labels else ""

    def fingerprint(self) -> str:
        """Its sha256."""
        try:
            return digest({"real_labels": file_sha256(Path(self.real_labels))})
        except OSError as error:
            raise UserError(f"real_labels={self.real_labels} cannot be read ({error.strerror})") from None


def evaluate(context: StageContext, config: CleanConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on those of the validation and test images that `inputs["data"]` has."""
    data, names = inputs["data"], inputs["model"].metrics["class_names"]
    classes = np.array(classes_of(inputs["model"], data.metrics["class_names"], f"data set {data.key[:12]}"))
    splits = [split for split in SPLITS if data.files_under(f"shards/{split}/")]
    real = RealLabels(config.real_labels, names) if config.real_labels else None
    files: list[FileEntry] = []
    metrics: dict[str, Any] = {}
    tables: dict[str, list[Row]] = {"per_class": [], "confusion": [], "reliability": []}
    for split, made in predict(context, inputs["model"], data, splits, "evaluation").items():
        files += made
        index = read_index(context.store, data, split, ["label", "source"])
        kept = Kept(names, classes[index["label"].to_numpy()], *_read(context, made, len(names)))
        measured, rows = _measured(split, kept)
        if real is not None:
            share, judged = real_accuracy(kept.predicted, real.of(index["source"].to_pylist()))
            measured |= {"real_top1": share, "real_images": judged}
        metrics[split] = measured
        for name, own in rows.items():
            tables[name] += own
    with context.store.staging() as folder:
        place = artifact_folder("evaluation", context.key)
        for name, own in tables.items():
            file = f"{name}.parquet"
            write_parquet(folder / file, pa.Table.from_pylist(own))
            files.append(publish_file(context.store, place, file, folder / file, len(own)))
    return StageResult(tuple(files), {**metrics, "class_names": names})


def headline(metrics: dict[str, Any]) -> Headline | None:
    """Top-1 on the test images."""
    return Headline("top-1", metrics["test"]["top1"]) if "test" in metrics else None


@dataclass(frozen=True)
class Kept:
    """A split's predictions beside its labels, in one order and in the model's classes."""

    names: list[str]
    labels: np.ndarray  # int [n]
    probabilities: np.ndarray  # float16 [n, classes]
    predicted: np.ndarray  # int [n]
    confidence: np.ndarray  # float32 [n]


def _measured(split: str, kept: Kept) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """The numbers of a split, and its rows of each table."""
    names, labels, predicted, confidence = kept.names, kept.labels, kept.predicted, kept.confidence
    measured = accuracy(labels, predicted, kept.probabilities)
    bins = reliability(confidence, predicted == labels)
    pairs = confusion(labels, predicted, len(names))
    per_class = [
        {
            "split": split,
            "label": number,
            "class_name": name,
            "class_images": int(measured["class_images"][number]),
            "class_correct": int(measured["class_correct"][number]),
            "class_predicted": int(pairs[:, number].sum()),
        }
        for number, name in enumerate(names)
    ]
    confused = [
        {"split": split, "label": int(label), "predicted": int(taken_for), "images": int(pairs[label, taken_for])}
        for label, taken_for in zip(*np.nonzero(pairs), strict=True)
    ]
    columns = zip(bins.edges[:-1], bins.edges[1:], bins.images, bins.confidence, bins.accuracy, strict=True)
    fields = ("low", "high", "images", "confidence", "accuracy")
    binned = [{"split": split, **dict(zip(fields, map(_plain, row), strict=True))} for row in columns]
    numbers = {name: measured[name] for name in ("top1", "top5", "images")}
    numbers |= {
        "ece": bins.expected_calibration_error,
        "mean_confidence": float(confidence.mean(dtype=np.float64)),
    }
    return numbers, {"per_class": per_class, "confusion": confused, "reliability": binned}


def _read(
    context: StageContext, files: tuple[FileEntry, ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities [n, classes], classes [n] and confidences [n] of a split, from its files of both kinds."""
    tables = {
        kind: pa.concat_tables(read_tables(context.store, [entry for entry in files if entry.name.startswith(kind)]))
        for kind in ("predictions/", "probabilities/")
    }
    probabilities = restore_probabilities(tables["probabilities/"], num_classes)
    predictions = tables["predictions/"]
    return probabilities, predictions["label"].to_numpy(), predictions["confidence"].to_numpy()


def _plain(value: Any) -> Any:
    """A numpy number as Python's, NaN as None."""
    number = value.item()
    return None if number != number else number
