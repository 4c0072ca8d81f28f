"""The report's figures with their words: what is drawn of an artifact, its title, text alternative and caption."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from storage.artifacts import FileEntry, Manifest
from storage.objects import Store
from storage.shards import read_table
from tasks import report_figures as figures
from tasks.report_images import data_uri
from tasks.selection.config import SelectConfig


@dataclass(frozen=True)
class Drawing:
    """One figure. It is drawn when a color scheme of it is asked for: `light` and `dark` are data URIs of PNGs."""

    title: str
    alt: str
    caption: str
    png: Callable[[figures.Theme], bytes]

    @property
    def light(self) -> str:
        """For a white page."""
        return data_uri(self.png(figures.LIGHT), "png")

    @property
    def dark(self) -> str:
        """For a dark page."""
        return data_uri(self.png(figures.DARK), "png")


def training_drawings(store: Store, models: Mapping[str, Manifest]) -> list[Drawing]:
    """Loss, validation accuracy and learning rate of some models, by their stages' names."""
    histories = {name: _history(store, model.file("history.parquet")) for name, model in models.items()}
    finals = "; ".join(f"{name}: {model.metrics['val_top1'] * 100:.1f} %" for name, model in models.items())
    names = ", ".join(models)
    return [
        Drawing(
            "Loss",
            f"Line chart of the training loss by epoch of {names}.",
            f"Under noise, means of {figures.SMOOTHED_RECORDS} recorded batches. Against soft pseudo-labels the loss cannot reach 0.",
            lambda theme: figures.loss_curves(theme, histories),
        ),
        Drawing(
            "Validation top-1",
            f"Line chart of validation top-1 by epoch. At the end: {finals}.",
            "Of the weight average, without noise, on the validation images.",
            lambda theme: figures.history_curves(theme, histories, "val_top1", "validation top-1, %", percent=True),
        ),
        Drawing(
            "Learning rate",
            f"Line chart of the learning rate by epoch of {names}.",
            "As set for each step.",
            lambda theme: figures.history_curves(theme, histories, "learning_rate", "learning rate"),
        ),
    ]


def confidence_drawing(labels: Manifest, selection: Manifest | None) -> Drawing:
    """How confident the pseudo labels are, and the threshold of the selection made of them."""
    threshold = SelectConfig.model_validate(selection.config).min_confidence if selection else None
    counts = labels.metrics["confidence_histogram"]
    fate = ""
    if selection is not None:
        fate = f" {selection.metrics['kept']:,} of {selection.metrics['labeled']:,} images were kept."
    return Drawing(
        "Confidence of the pseudo-labels",
        f"Histogram of {sum(counts):,} confidences from 0 to 1"
        + (f" with the threshold at {threshold:g}." if threshold else ".")
        + f" The fullest bin begins at {int(np.argmax(counts)) / len(counts):g}.{fate}",
        f"{sum(counts):,} images, mean {labels.metrics['mean_confidence']:.3f}.{fate}",
        lambda theme: figures.confidence_histogram(theme, counts, threshold),
    )


def balance_drawing(selection: Manifest) -> Drawing:
    """How many images each class has before and after balancing."""
    names, per_class = selection.metrics["class_names"], selection.metrics["per_class"]
    ranges = {
        field: f"{min(values):,} to {max(values):,}"
        for field, values in ((f, per_class[f]) for f in ("available", "kept", "copies"))
    }
    empty = sum(not value for value in per_class["kept"])
    return Drawing(
        "Images of each class, before and after balancing",
        f"Chart of {len(names)} classes. Labeled as the class: {ranges['available']} images; kept: {ranges['kept']}; "
        f"after balancing: {ranges['copies']}.",
        f"{_rule(SelectConfig.model_validate(selection.config))}{_empty(empty)}",
        lambda theme: figures.class_counts(theme, names, per_class),
    )


def class_drawing(names: list[str], before: np.ndarray, after: np.ndarray, student: str) -> Drawing:
    """Test accuracy of each class: of the first teacher, and of the network named `student` (both in [0, 1])."""
    gains = after - before
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    summary = f"{student} is better than 0/teacher in {better} of {len(names)} classes and worse in {worse}."
    return Drawing(
        "Accuracy of each class, teacher and last student",
        f"Chart of the test accuracy by class. {summary}",
        summary,
        lambda theme: figures.class_accuracy(theme, names, before, after, student),
    )


def reliability_drawing(store: Store, evaluation: Manifest) -> Drawing:
    """How often the model is right where it says how sure it is, on the test images."""
    rows = [r for r in read_table(store, evaluation.file("reliability.parquet")).to_pylist() if r["split"] == "test"]
    measured = evaluation.metrics["test"]
    sure = measured["mean_confidence"] - measured["top1"]
    summary = (
        f"Expected calibration error {measured['ece'] * 100:.2f} points: the model is {abs(sure) * 100:.2f} points too "
        f"{'sure' if sure > 0 else 'unsure'} on average."
    )
    return Drawing(
        "Is its confidence worth believing?",
        f"Bar chart of the accuracy by confidence in {len(rows)} bins, with the diagonal. {summary}",
        f"{summary} Bars on the diagonal are calibrated; paler ones hold fewer images.",
        lambda theme: figures.reliability_diagram(theme, rows),
    )


def confusion_drawing(names: list[str], counts: np.ndarray) -> Drawing:
    """Which classes a model takes for which on the test images; counts: int [classes, classes], labels by predictions."""
    wrong = int(counts.sum() - np.trace(counts))
    summary = f"{wrong:,} of {int(counts.sum()):,} test images are taken for another class."
    return Drawing(
        "Which classes are taken for which",
        f"Matrix of {len(names)} classes by predicted class. {summary}",
        f"{summary} Rows are labels, columns predictions; the diagonal is right.",
        lambda theme: figures.confusion_matrix(theme, names, counts),
    )


def confusion_tested(store: Store, evaluation: Manifest) -> np.ndarray:
    """Test images by label and predicted class, int [classes, classes]."""
    num_classes = len(evaluation.metrics["class_names"])
    counts = np.zeros((num_classes, num_classes), np.int64)
    for row in read_table(store, evaluation.file("confusion.parquet")).to_pylist():
        if row["split"] == "test":
            counts[row["label"], row["predicted"]] = row["images"]
    return counts


def classes_tested(store: Store, evaluation: Manifest) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Class names, test images and accuracy (NaN without images), in the order of the labels."""
    table = read_table(store, evaluation.file("per_class.parquet")).to_pylist()
    rows = sorted((row for row in table if row["split"] == "test"), key=lambda row: row["label"])
    accuracy = [r["class_correct"] / r["class_images"] if r["class_images"] else math.nan for r in rows]
    return [r["class_name"] for r in rows], np.array([r["class_images"] for r in rows]), np.array(accuracy)


def _history(store: Store, entry: FileEntry) -> figures.History:
    names = ("epoch", "learning_rate", "loss_labeled", "loss_unlabeled", "val_top1")
    table = read_table(store, entry, names)
    return {name: np.array(table[name].to_pylist(), np.float64) for name in names}


def _empty(classes: int) -> str:
    return f" {classes:,} {'class' if classes == 1 else 'classes'} stayed empty." if classes else ""


def _rule(settings: SelectConfig) -> str:
    """How the classes were balanced, in a sentence."""
    cap = f"{settings.images_per_class:,}"
    if not settings.balance:
        text = "Every image that passes the filter is kept once; the classes are not balanced."
    elif settings.method == "reference":
        text = f"Each class has a threshold of its own; above it chance gives every image its share of {cap} copies."
    else:
        text = f"At most {cap} of a class are kept, the most confident first; classes with fewer are filled up with copies."
    return text if settings.subset == 1 else f"{text} Of these, a share of {settings.subset:g} is used."
