"""evaluate-fgsm and evaluate-pgd: top-1 on images that were changed to mislead this very network, by size of the change.

Pixels are in [0, 1] and epsilons in 1/255 of that; the network is the un-noised one, in float32; the attack is untargeted, away from the
true class. The paper sweeps FGSM's epsilon (figure 3) and gives PGD with 10 steps at 16/255 (section 4.4).
"""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.evaluators.altered import Alteration, Asked, first_classes, predict_altered, shard_sets
from tasks.evaluators.contract import EvaluatorConfig, Headline

VERSION = 1
SCALE = 255


class AttackConfig(EvaluatorConfig):
    """Which images, and how far each pixel may go."""

    split: Literal["test", "val"] = "test"
    epsilons: tuple[float, ...] = Field(
        min_length=1, description="largest change of a pixel, in 1/255 of its range; 0: clean"
    )

    @field_validator("epsilons")
    @classmethod
    def _rising(cls, epsilons: tuple[float, ...]) -> tuple[float, ...]:
        if list(epsilons) != sorted(set(epsilons)) or epsilons[0] < 0:
            raise ValueError("epsilons are 0 or more, each larger than the one before")
        return epsilons


class FgsmConfig(AttackConfig):
    """One signed gradient step of each size."""

    epsilons: tuple[float, ...] = Field((0, 1, 2, 4, 8, 16), min_length=1, description="as above")


class PgdConfig(AttackConfig):
    """Several signed gradient steps, each time back to within epsilon of the image."""

    epsilons: tuple[float, ...] = Field((0, 2, 4, 8, 16), min_length=1, description="as above")
    steps: int = Field(10, ge=1)
    step_share: float = Field(
        0.25, gt=0, description="length of a step, in epsilons; 0.25: 2.5 epsilon over 10 steps (Madry et al. 2018)"
    )


def evaluate_fgsm(context: StageContext, config: FgsmConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Attack `inputs["model"]` on images of `inputs["data"]`. `metrics.accuracy`: by epsilon."""
    return _evaluate(context, "evaluate-fgsm", config, inputs, {"method": "fgsm"})


def evaluate_pgd(context: StageContext, config: PgdConfig, inputs: dict[str, Manifest]) -> StageResult:
    """As evaluate_fgsm."""
    settings = {"method": "pgd", "steps": config.steps, "step_share": config.step_share}
    return _evaluate(context, "evaluate-pgd", config, inputs, settings)


def headline_fgsm(metrics: dict[str, Any]) -> Headline | None:
    """Top-1 at the largest epsilon."""
    return _headline("FGSM", metrics)


def headline_pgd(metrics: dict[str, Any]) -> Headline | None:
    """Top-1 at the largest epsilon."""
    return _headline("PGD", metrics)


def _headline(name: str, metrics: dict[str, Any]) -> Headline:
    epsilon, value = list(metrics["accuracy"].items())[-1]
    return Headline(f"{name} {epsilon}/{SCALE}", value)


def _evaluate(
    context: StageContext, stage: str, config: AttackConfig, inputs: dict[str, Manifest], settings: dict[str, Any]
) -> StageResult:
    model = inputs["model"]
    sets = shard_sets(model, inputs["data"], config.split)
    asked = [
        Asked(images, {"epsilon": epsilon / SCALE}, f"{epsilon:g}/{number:05d}")
        for epsilon in config.epsilons
        for number, images in enumerate(sets)
    ]
    alteration = Alteration({"name": "attack", **settings}, exact=True)
    predicted = predict_altered(context, stage, model, alteration, asked)
    tables, each = predicted.tables(context), len(sets)
    accuracy = {}
    for place, epsilon in enumerate(config.epsilons):
        own = pa.concat_tables(tables[place * each : (place + 1) * each])
        accuracy[f"{epsilon:g}"] = float(np.mean(first_classes(own) == own["label"].to_numpy()))
    metrics = {"split": config.split, "images": sum(own.count for own in sets), "accuracy": accuracy}
    return StageResult(predicted.files, metrics, {"numerics": predicted.numerics})
