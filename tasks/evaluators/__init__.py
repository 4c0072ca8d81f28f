"""The table of evaluators. Each is one file: a config, a plain function, a number for tables; its artifact is an `evaluation`.

A new one is a file here, a line in EVALUATORS, and a field of the `evaluate` section (section.py).
"""

from collections.abc import Callable
from typing import Any

from storage.artifacts import Manifest
from tasks.contract import StageContext, StageResult
from tasks.evaluators import attacked, clean, corrupted, imagenet_c, imagenet_p, perturbed, subset
from tasks.evaluators.contract import Evaluator, EvaluatorConfig, Headline

__all__ = ["BY_SHORT", "EVALUATORS", "Evaluator", "Headline", "headline_of"]

Run = Callable[[StageContext, Any, dict[str, Manifest]], StageResult]
NumberOf = Callable[[dict[str, Any]], Headline | None]


def _evaluator(
    name: str, short: str, version: int, config: type[EvaluatorConfig], run: Run, headline: NumberOf, data: bool = True
) -> Evaluator:
    return Evaluator(name, version, "evaluation", config, run, short, headline, data)


EVALUATORS = {
    evaluator.name: evaluator
    for evaluator in (
        _evaluator("evaluate", "clean", clean.VERSION, clean.CleanConfig, clean.evaluate, clean.headline),
        _evaluator("evaluate-corrupted", "corrupted", corrupted.VERSION, corrupted.CorruptedConfig, corrupted.evaluate, corrupted.headline),
        _evaluator("evaluate-perturbed", "perturbed", perturbed.VERSION, perturbed.PerturbedConfig, perturbed.evaluate, perturbed.headline),
        _evaluator("evaluate-fgsm", "fgsm", attacked.VERSION, attacked.FgsmConfig, attacked.evaluate_fgsm, attacked.headline_fgsm),
        _evaluator("evaluate-pgd", "pgd", attacked.VERSION, attacked.PgdConfig, attacked.evaluate_pgd, attacked.headline_pgd),
        _evaluator("evaluate-subset", "subset", subset.VERSION, subset.SubsetConfig, subset.evaluate, subset.headline, data=False),
        _evaluator("evaluate-imagenet-c", "imagenet_c", imagenet_c.VERSION, imagenet_c.ImageNetCConfig, imagenet_c.evaluate, imagenet_c.headline, data=False),
        _evaluator("evaluate-imagenet-p", "imagenet_p", imagenet_p.VERSION, imagenet_p.ImageNetPConfig, imagenet_p.evaluate, imagenet_p.headline, data=False),
    )
}  # fmt: skip
BY_SHORT = {evaluator.short: evaluator for evaluator in EVALUATORS.values()}


def headline_of(evaluation: Manifest) -> Headline | None:
    """The number that stands for an evaluation; None where its stage is not known here, or measured nothing of that kind."""
    evaluator = EVALUATORS.get(evaluation.stage)
    return evaluator.headline(evaluation.metrics) if evaluator else None
