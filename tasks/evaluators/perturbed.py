"""evaluate-perturbed: ImageNet-P's measures on sequences made on the fly of any labeled data set (labels are not looked at)."""

from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from models.corruptions.levels import table_for
from models.perturbation_levels import SEQUENCES
from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import Alteration, Asked, image_size_of, predict_altered, shard_sets
from tasks.evaluators.contract import EvaluatorConfig, Headline
from tasks.evaluators.imagenet_p import stability

VERSION = 1


class PerturbedConfig(EvaluatorConfig):
    """Which perturbations, of which images. Each image becomes 16 to 41 frames a kind."""

    split: Literal["test", "val"] = "test"
    kinds: tuple[str, ...] = Field(SEQUENCES, min_length=1, description="perturbations, of the ten")
    levels: Literal["auto", "imagenet", "cifar"] = Field(
        "auto", description="whose steps: ImageNet-P's or CIFAR-10-P's; auto: the latter up to 64 pixels"
    )
    seed: int = Field(0, ge=0, description="of the randomness, which belongs to each image's key")

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(kinds) - set(SEQUENCES))
        if unknown:
            raise ValueError(f"unknown perturbations {', '.join(unknown)}; choose from {', '.join(SEQUENCES)}")
        if len(set(kinds)) < len(kinds):
            raise ValueError("a kind stands twice; remove one")
        return kinds


def evaluate(context: StageContext, config: PerturbedConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Measure `inputs["model"]` on sequences made of the images of `inputs["data"]`."""
    model = inputs["model"]
    sets = shard_sets(model, inputs["data"], config.split)
    levels = table_for(image_size_of(context.store, model)) if config.levels == "auto" else config.levels
    asked = [
        Asked(images, {"kind": kind}, f"{kind}/{number:05d}", kind)
        for kind in config.kinds
        for number, images in enumerate(sets)
    ]
    alteration = Alteration({"name": "sequence", "table": levels, "seed": config.seed})
    predicted = predict_altered(context, "evaluate-perturbed", model, alteration, asked)
    by_kind: dict[str, list[pa.Table]] = {}
    for piece, table in zip(asked, predicted.tables(context), strict=True):
        by_kind.setdefault(piece.variant["kind"], []).append(table)
    metrics = {"split": config.split, "levels": levels, **stability(by_kind)}
    return StageResult(predicted.files, metrics, {"numerics": predicted.numerics})


def headline(metrics: dict[str, Any]) -> Headline | None:
    """How often a frame's class is that of the one before it, over all perturbations."""
    return Headline("unflipped", 1 - metrics["mean_flip"])
