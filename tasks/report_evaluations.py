"""The report's section on evaluations: all models beside each other, kind by kind; of clean images each model's mistakes too.

Only evaluations that are stages of the run: they are inputs of the report, and so in its key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from storage.artifacts import Manifest
from storage.objects import Store
from tasks.comparison.compare import Group, group_evaluations
from tasks.comparison.picture import TITLES, comparison_picture
from tasks.report_drawings import Drawing, confusion_drawing, confusion_tested, reliability_drawing
from tasks.report_figures import MOST_BARS, WIDTH_IN, Theme

MOST_MISTAKES = 10  # pairs of classes that are listed of a model

Row = dict[str, Any]


def evaluation_section(store: Store, models: Mapping[str, Manifest], evaluations: Sequence[Manifest]) -> list[Row]:
    """One entry a kind of evaluation: figures, the table's measures by model, and of clean images each model's mistakes.

    `models`: stage name -> artifact, the teacher by whose errors others are divided first.
    """
    groups = group_evaluations(evaluations, models, next(iter(models)))
    return [_entry(store, group) for group in groups if group.measures]


def most_mistaken(names: Sequence[str], counts: np.ndarray) -> list[tuple[str, str, int]]:
    """The pairs of classes that are confused most: label, prediction, images; the most frequent first.

    counts: int [classes, classes], labels by predictions.
    """
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_MISTAKES]
    pairs = (np.unravel_index(place, wrong.shape) for place in order)
    return [(names[label], names[taken], int(wrong[label, taken])) for label, taken in pairs if wrong[label, taken]]


def _entry(store: Store, group: Group) -> Row:
    figures = [_beside(group)]
    mistakes: dict[str, list[tuple[str, str, int]]] = {}
    if group.evaluator == "clean":
        for name, evaluation in group.manifests.items():
            names, counts = evaluation.metrics["class_names"], confusion_tested(store, evaluation)
            own = [reliability_drawing(store, evaluation)]
            if len(names) <= MOST_BARS:
                own.append(confusion_drawing(names, counts))
            figures += [replace(drawing, title=f"{name}: {drawing.title}") for drawing in own]
            mistakes[name] = most_mistaken(names, counts)
    return {
        "evaluator": group.evaluator,
        "title": TITLES[group.evaluator],
        "of": group.of,
        "models": list(group.manifests),
        "measures": group.measures,
        "figures": figures,
        "mistakes": mistakes,
    }


def _beside(group: Group) -> Drawing:
    """The models of a kind of evaluation in one figure."""
    names, first = list(group.manifests), group.measures[0]
    numbers = "; ".join(f"{name}: {first.number(name)}" for name in names)
    return Drawing(
        "All models beside each other",
        f"Chart of {', '.join(names)} on {TITLES[group.evaluator]}. {first.title}: {numbers}.",
        f"{first.title}: {numbers}.",
        partial(_picture, group, names),
    )


def _picture(group: Group, names: Sequence[str], theme: Theme) -> bytes:
    return comparison_picture([group], names, theme, WIDTH_IN)
