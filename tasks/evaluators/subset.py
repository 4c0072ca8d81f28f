"""evaluate-subset: images of some of the model's classes, among which alone it may choose. ImageNet-A, and others of its form.

The logits are restricted to the classes before the argmax: a network of 1,000 classes that sees ImageNet-A's 200 is not wrong for
naming one of the 800 others, it is asked which of the 200 it is (Hendrycks et al. 2019, "Natural adversarial examples").
"""

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from storage.artifacts import Manifest
from storage.errors import UserError
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import Alteration, Asked, classes_of, first_classes, predict_altered, ranked_classes
from tasks.evaluators.archives import Archive, ArchiveConfig, labeled
from tasks.evaluators.contract import Headline
from tasks.metrics.calibration import reliability
from tasks.metrics.classification import LEAST_CLASSES_FOR_TOP_5, hits

VERSION = 1


class SubsetConfig(ArchiveConfig):
    """Class folders below `root`."""

    classes: tuple[str, ...] = Field(
        (), description="the classes among which the model chooses, by name; empty: those that have a folder"
    )


def evaluate(context: StageContext, config: SubsetConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on the images below `config.root`."""
    model, archive = inputs["model"], Archive(config.root)
    by_class = {name: files for (name,), files in archive.by_folder(1).items()}
    classes = config.classes or tuple(sorted(by_class))
    if config.classes:
        by_class = {name: files for name, files in by_class.items() if name in config.classes}
    if len(classes) < 2 or not by_class:
        raise UserError(
            f"root={config.root}: {len(by_class)} of the {len(classes)} classes to choose from have images; a choice needs two "
            "classes and an image. Name the folders as the model's classes are named, or set classes"
        )
    restrict = tuple(sorted(classes_of(model, classes, f"root={config.root}")))
    files, labels = labeled(model, archive, by_class)
    asked = [Asked(own, {}, f"{number:05d}") for number, own in enumerate(archive.stretches(files, labels, "subset"))]
    alteration = Alteration({"name": "none"}, restrict=restrict)
    predicted = predict_altered(context, "evaluate-subset", model, alteration, asked)
    rows = pa.concat_tables(predicted.tables(context))
    truth = rows["label"].to_numpy()
    right = first_classes(rows) == truth
    top5 = float(hits(truth, ranked_classes(rows)).mean()) if len(restrict) >= LEAST_CLASSES_FOR_TOP_5 else None
    ece = reliability(rows["confidence"].to_numpy(), right).expected_calibration_error
    metrics = {
        "images": len(rows),
        "num_classes": len(restrict),
        "top1": float(np.mean(right)),
        "top5": top5,
        "ece": ece,
    }
    return StageResult(predicted.files, metrics, {"numerics": predicted.numerics})


def headline(metrics: dict[str, Any]) -> Headline | None:
    """Top-1 among the classes."""
    return Headline(f"{metrics['num_classes']} classes", metrics["top1"])
