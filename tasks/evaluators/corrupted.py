"""evaluate-corrupted: the error under ImageNet-C's corruptions, made on the fly of any labeled data set.

Raw errors only: what they are divided by (a baseline's errors) is chosen when models are compared. The error under the published
ImageNet-C is evaluate-imagenet-c's.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from models.corruptions.levels import KIND_NAMES, SEVERITIES, table_for
from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import Alteration, Asked, first_classes, image_size_of, predict_altered, shard_sets
from tasks.evaluators.contract import EvaluatorConfig, Headline
from tasks.metrics.corruption import mean_errors

VERSION = 1


class CorruptedConfig(EvaluatorConfig):
    """Which corruptions, how strong, of which images."""

    split: Literal["test", "val"] = "test"
    kinds: tuple[str, ...] = Field(KIND_NAMES, min_length=1, description="corruptions, of the fifteen")
    severities: tuple[int, ...] = Field(SEVERITIES, min_length=1, description="1 (weak) to 5")
    levels: Literal["auto", "imagenet", "cifar"] = Field(
        "auto", description="whose strengths: ImageNet-C's or CIFAR-10-C's; auto: the latter up to 64 pixels"
    )
    seed: int = Field(0, ge=0, description="of the corruptions' randomness, which belongs to each image's key")

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(kinds) - set(KIND_NAMES))
        if unknown:
            raise ValueError(f"unknown corruptions {', '.join(unknown)}; choose from {', '.join(KIND_NAMES)}")
        return _distinct(kinds)

    @field_validator("severities")
    @classmethod
    def _in_range(cls, severities: tuple[int, ...]) -> tuple[int, ...]:
        if not set(severities) <= set(SEVERITIES):
            raise ValueError(f"severities are {SEVERITIES[0]} to {SEVERITIES[-1]}")
        return _distinct(severities)


def evaluate(context: StageContext, config: CorruptedConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on the corrupted images of `inputs["data"]`. `metrics.errors`: by kind and severity."""
    model = inputs["model"]
    sets = shard_sets(model, inputs["data"], config.split)
    levels = table_for(image_size_of(context.store, model)) if config.levels == "auto" else config.levels
    asked = [
        Asked(images, {"kind": kind, "severity": severity}, f"{kind}/{severity}/{number:05d}", kind)
        for kind in config.kinds
        for severity in config.severities
        for number, images in enumerate(sets)
    ]
    alteration = Alteration({"name": "corruption", "table": levels, "seed": config.seed})
    predicted = predict_altered(context, "evaluate-corrupted", model, alteration, asked)
    errors = errors_of(asked, predicted.tables(context))
    images = sum(own.count for own in sets)
    metrics = {"split": config.split, "images": images, "levels": levels, **summary(errors)}
    return StageResult(predicted.files, metrics, {"numerics": predicted.numerics})


def headline(metrics: dict[str, Any]) -> Headline | None:
    """Top-1 over all corruptions and severities, each weighing the same."""
    return Headline("corrupted", metrics["top1"])


def errors_of(asked: list[Asked], tables: list[Any]) -> dict[str, dict[int, float]]:
    """The error of each kind at each severity, in [0, 1], over all their images."""
    wrong: dict[tuple[str, int], list[np.ndarray]] = {}
    for piece, table in zip(asked, tables, strict=True):
        place = piece.variant["kind"], piece.variant["severity"]
        wrong.setdefault(place, []).append(first_classes(table) != table["label"].to_numpy())
    errors: dict[str, dict[int, float]] = {}
    for (kind, severity), parts in wrong.items():
        errors.setdefault(kind, {})[severity] = float(np.concatenate(parts).mean())
    return errors


def summary(errors: dict[str, dict[int, float]]) -> dict[str, Any]:
    """The part of the metrics that all corruption evaluators share: errors, means by kind, their mean, and top-1."""
    means = mean_errors(errors)
    mean = float(np.mean(list(means.values())))
    return {
        "errors": {kind: {str(severity): error for severity, error in own.items()} for kind, own in errors.items()},
        "mean_errors": means,
        "mean_error": mean,
        "top1": 1 - mean,
    }


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value stands twice; remove one")
    return values
