"""Which of several models is better, at what, and whether that is more than chance.

Only like is laid beside like: evaluations with the same settings, on the same data. Numbers are shares in [0, 1] unless they are called a
rate or a distance.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from storage.artifacts import Manifest, get, list_artifacts
from storage.errors import UserError
from storage.keys import canonical_json
from storage.objects import Store
from tasks.comparison.images import SPLIT, correct_images, image_scores
from tasks.evaluators import EVALUATORS, Evaluator
from tasks.metrics.corruption import check_baseline
from tasks.metrics.significance import bootstrap_chance, holm, mcnemar, paired_bootstrap, wilson_interval

SIGNIFICANT = 0.05
TESTS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"McNemar": mcnemar, "bootstrap": bootstrap_chance}
UNITS = {"share": (100, 2), "rate": (1, 1), "distance": (1, 3)}  # factor and decimals as people read them: shares in %


@dataclass(frozen=True)
class Value:
    """A number of a model, with its 95 % interval where it is a share of images."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measure:
    """One row of the table: a number of each model that has it. `better`: whether larger or smaller ones are."""

    name: str
    values: dict[str, Value]
    better: str = "larger"
    unit: str = "share"

    @property
    def title(self) -> str:
        """The name with the unit of `number`."""
        return f"{self.name}, %" if self.unit == "share" else self.name

    def number(self, model: str) -> str:
        """A model's number as people read it; - where there is none."""
        factor, digits = UNITS[self.unit]
        return f"{factor * self.values[model].value:.{digits}f}" if model in self.values else "-"

    def interval(self, model: str) -> str:
        """Its 95 % interval in the same unit; empty where it has none."""
        factor, value = UNITS[self.unit][0], self.values.get(model)
        if value is None or value.low is None or value.high is None:
            return ""
        return f"{factor * value.low:.1f} - {factor * value.high:.1f}"


@dataclass(frozen=True)
class Pair:
    """Two models on the same images: b's top-1 less a's with its 95 % interval (bootstrap), and a test's chance (Holm).

    `test`: McNemar's; of corruptions the bootstrap's, as an image has many predictions: its score is the share that is right.
    `better`: the name of the one that is significantly better; empty: neither is. `won`: images that b alone gets right, or
    under more corruptions.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    test: str
    chance: float
    better: str
    won: int
    lost: int


@dataclass
class Group:
    """Evaluations of one kind, with the same settings on the same images, by model."""

    evaluator: str
    of: str
    manifests: dict[str, Manifest]
    measures: list[Measure] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def compare(store: Store, models: Mapping[str, Manifest], baseline: str = "") -> list[Group]:
    """The evaluations of some models (name -> artifact), those of each kind beside each other, in the order of EVALUATORS.

    `baseline`: the model by whose errors and flips those of the others are divided; empty: the first. Raises UserError where the models
    have no evaluation in common.
    """
    named = baseline or next(iter(models))
    groups = [group for group in evaluations_of(store, models, named) if len(group.manifests) > 1]
    if not groups:
        raise UserError(
            f"{', '.join(models)} have no evaluation in common; measure each of them first, e.g. nst evaluate clean "
            f"{next(iter(models))} --data DATA"
        )
    for group in groups:
        group.pairs = _pairs(store, group)
    return groups


def evaluations_of(store: Store, models: Mapping[str, Manifest], baseline: str = "") -> list[Group]:
    """All evaluations of some models that a store has, by today's versions of the evaluators; see group_evaluations."""
    current = [m for m in list_artifacts(store, kind="evaluation") if _is_current(m)]
    return group_evaluations(current, models, baseline)


def group_evaluations(
    evaluations: Iterable[Manifest], models: Mapping[str, Manifest], baseline: str = ""
) -> list[Group]:
    """Those evaluations that are of some models (name -> artifact) with their numbers, in the order of EVALUATORS.

    Of those that were made again the newest counts. `baseline`: as in `compare`; empty: nothing is divided. Pairs are not
    tested.
    """
    groups = _grouped(evaluations, models)
    for group in groups:
        group.measures = MEASURES[_form(group)](group, baseline)
    return groups


def _is_current(evaluation: Manifest) -> bool:
    evaluator = EVALUATORS.get(evaluation.stage)
    return evaluator is not None and evaluation.stage_version == evaluator.version


def _grouped(evaluations: Iterable[Manifest], models: Mapping[str, Manifest]) -> list[Group]:
    names = {manifest.key: name for name, manifest in models.items()}
    found: dict[tuple[int, bytes], Group] = {}
    order = list(EVALUATORS)
    for manifest in evaluations:
        evaluator = EVALUATORS[manifest.stage]
        name = names.get(manifest.inputs.get("model", ""))
        if name is None:
            continue
        others = {role: key for role, key in manifest.inputs.items() if role != "model"}
        identity = order.index(evaluator.name), canonical_json([manifest.config, others])
        group = found.setdefault(identity, Group(evaluator.short, _what(evaluator, manifest), {}))
        known = group.manifests.get(name)
        if known is None or known.generation < manifest.generation:
            group.manifests[name] = manifest
    for group in found.values():
        group.manifests = {name: group.manifests[name] for name in models if name in group.manifests}
    return [found[identity] for identity in sorted(found)]


def _what(evaluator: Evaluator, manifest: Manifest) -> str:
    """What it was measured on, in a few words."""
    data = manifest.inputs.get("data")
    said = [f"data set {data[:12]}"] if data else []
    settings = [f"{name}={value}" for name, value in manifest.config.items()]
    return ", ".join([*said, *settings])


def _form(group: Group) -> str:
    metrics = next(iter(group.manifests.values())).metrics
    return next((form for form in ("errors", "flips", "accuracy") if form in metrics), "top1")


def _shares(group: Group, named: str) -> list[Measure]:
    """top-1 with its interval, top-5, calibration error; of clean images and of subsets."""
    own = {name: m.metrics.get(SPLIT, m.metrics) for name, m in group.manifests.items()}
    own = {name: metrics for name, metrics in own.items() if "top1" in metrics}
    measures = []
    for title, name, better in (
        ("top-1", "top1", "larger"),
        ("top-5", "top5", "larger"),
        ("right by several labels", "real_top1", "larger"),
        ("calibration error", "ece", "smaller"),
    ):
        values = {}
        for model, metrics in own.items():
            if metrics.get(name) is None:
                continue
            images = metrics["real_images"] if name == "real_top1" else metrics["images"]
            interval = wilson_interval(round(metrics[name] * images), images) if name != "ece" else (None, None)
            values[model] = Value(metrics[name], *interval)
        if values:
            measures.append(Measure(title, values, better))
    return measures


def _errors(group: Group, named: str) -> list[Measure]:
    """Errors by corruption and their mean; mCE by AlexNet's where it was measured; the errors relative to the baseline's."""
    means = {name: m.metrics["mean_errors"] for name, m in group.manifests.items()}
    kinds = list(next(iter(means.values())))
    measures = [
        Measure("error, all corruptions", _each(group, "mean_error"), "smaller"),
        *(
            Measure(kind.replace("_", " "), {n: Value(own[kind]) for n, own in means.items()}, "smaller")
            for kind in kinds
        ),
    ]
    if all("mce" in m.metrics for m in group.manifests.values()):
        measures.append(Measure("mCE (AlexNet 100)", _each(group, "mce"), "smaller", "rate"))
    return measures + _relative("error", means, named)


def _flips(group: Group, named: str) -> list[Measure]:
    """Flip probabilities, top-5 distance, and mFR by the baseline's flips."""
    flips = {name: m.metrics["flips"] for name, m in group.manifests.items()}
    kinds = list(next(iter(flips.values())))
    return [
        Measure("flips, all perturbations", _each(group, "mean_flip"), "smaller"),
        *(
            Measure(kind.replace("_", " "), {n: Value(own[kind]) for n, own in flips.items()}, "smaller")
            for kind in kinds
        ),
        Measure("top-5 distance", _each(group, "mean_top5_distance"), "smaller", "distance"),
        *_relative("mFR", flips, named),
    ]


def _accuracies(group: Group, named: str) -> list[Measure]:
    """top-1 by epsilon."""
    own = {name: m.metrics["accuracy"] for name, m in group.manifests.items()}
    images = {name: m.metrics["images"] for name, m in group.manifests.items()}
    return [
        Measure(
            f"top-1 at {epsilon}/255",
            {
                name: Value(values[epsilon], *wilson_interval(round(values[epsilon] * images[name]), images[name]))
                for name, values in own.items()
            },
        )
        for epsilon in next(iter(own.values()))
    ]


MEASURES = {"top1": _shares, "errors": _errors, "flips": _flips, "accuracy": _accuracies}


def _each(group: Group, field_name: str) -> dict[str, Value]:
    return {name: Value(m.metrics[field_name]) for name, m in group.manifests.items()}


def _relative(what: str, numbers: Mapping[str, Mapping[str, float]], named: str) -> list[Measure]:
    """The mean ratio to the baseline's number of each kind, in percent. Raises UserError where the baseline lacks a kind."""
    if named not in numbers:
        return []
    baseline = numbers[named]
    if any(not value for value in baseline.values()):
        return []  # nothing can be divided by 0, and the raw numbers say it
    values = {}
    for name, own in numbers.items():
        check_baseline(own, baseline, named)
        values[name] = Value(100 * float(np.mean([own[kind] / baseline[kind] for kind in own])))
    return [Measure(f"{what} relative to {named} (100)", values, "smaller", "rate")]


def _pairs(store: Store, group: Group) -> list[Pair]:
    """Each model against the first, and each against the one before it, on the same images."""
    found = {name: image_scores(store, manifest) for name, manifest in group.manifests.items()}
    scores = {name: own for name, own in found.items() if own is not None}
    names = list(scores)
    wanted = list(dict.fromkeys([*((names[0], name) for name in names[1:]), *pairwise(names)])) if names else []
    test = "bootstrap" if _form(group) == "errors" else "McNemar"
    chances = holm({f"{a}\n{b}": TESTS[test](scores[a], scores[b]) for a, b in wanted})
    pairs = []
    for a, b in wanted:
        difference, chance = float(scores[b].mean() - scores[a].mean()), chances[f"{a}\n{b}"]
        better = "" if chance >= SIGNIFICANT else b if difference > 0 else a
        won, lost = int((scores[b] > scores[a]).sum()), int((scores[b] < scores[a]).sum())
        pairs.append(Pair(a, b, difference, *paired_bootstrap(scores[a], scores[b]), test, chance, better, won, lost))
    return pairs


def changed_images(store: Store, groups: Sequence[Group], a: str, b: str, most: int) -> dict[str, list[dict[str, Any]]]:
    """Clean images on which two models differ: `won` (b alone is right) and `lost`, at most so many, spread over the classes.

    Each with key, label, a and b (class names). Raises UserError where both were not measured on the same clean images.
    """
    for group in groups:
        if group.evaluator == "clean" and a in group.manifests and b in group.manifests:
            break
    else:
        raise UserError(f"{a} and {b} were not measured on the same clean images; run nst evaluate clean on both first")
    first, second = (correct_images(store, group.manifests[name]) for name in (a, b))
    if first is None or second is None:
        raise UserError(f"{a} and {b} were not measured on {SPLIT} images")
    names = get(store, "model", group.manifests[a].inputs["model"]).metrics["class_names"]
    keys, labels = first[0], first[1]
    found = {}
    for fate, mask in (("won", ~first[3] & second[3]), ("lost", first[3] & ~second[3])):
        rows = np.flatnonzero(mask)
        rank = np.zeros(len(rows), np.int64)  # of an image among those of its class, so that all classes come first
        for label in np.unique(labels[rows]):
            own = np.flatnonzero(labels[rows] == label)
            rank[own] = np.arange(len(own))
        chosen = rows[np.lexsort((labels[rows], rank))][:most]
        found[fate] = [
            {"key": keys[n], "label": names[labels[n]], "a": names[first[2][n]], "b": names[second[2][n]]}
            for n in chosen
        ]
    return found
