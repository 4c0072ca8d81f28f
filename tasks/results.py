"""The table of a run: one record a model. Printed by `nst results`, drawn by the report."""

from typing import Any

from storage.artifacts import Manifest
from tasks.evaluators import EVALUATORS, headline_of


def result_records(experiment: str, manifests: dict[str, Manifest]) -> list[dict[str, Any]]:
    """One record a model, teacher first, of the stages that are done (`manifests`: stage name -> artifact).

    Fields: iteration, role, ref, key, top1 and top5 on the test set in [0, 1] (None: not measured, or not meaningful),
    val_top1, `others` (of every other evaluation its title -> number in [0, 1]), `evaluations` (the evaluator's short name -> all
    numbers of its metrics, in their sections), and of the selection the model learned from: kept, dropped, duplicated (None for a
    teacher).
    """
    records = []
    models = sorted(
        (name for name, m in manifests.items() if m.kind == "model" and not name.endswith("/selector")), key=_order
    )
    for name in models:
        iteration, role = name.split("/")
        measured = _evaluation(manifests, manifests[name].key)
        test, val = measured.get("test", {}), measured.get("val", {})
        chosen = manifests[name].inputs.get("selection")
        selection = next((m.metrics for m in manifests.values() if m.kind == "selection" and m.key == chosen), {})
        records.append(
            {
                "iteration": int(iteration),
                "role": role,
                "ref": f"{experiment}/{name}",
                "key": manifests[name].key,
                "top1": test.get("top1"),
                "top5": test.get("top5"),
                "val_top1": val.get("top1"),
                "others": _others(manifests, manifests[name].key),
                "evaluations": _numbers_of(manifests, manifests[name].key),
                **{field: selection.get(field) for field in ("kept", "dropped", "duplicated")},
            }
        )
    return records


def gains(records: list[dict[str, Any]]) -> list[float | None]:
    """Of each record its top-1 less that of the first teacher, in [-1, 1]; None for teachers and what was not measured."""
    first = next((record["top1"] for record in records if record["top1"] is not None), None)
    return [None if r["role"] == "teacher" or r["top1"] is None else r["top1"] - first for r in records]


def _evaluation(manifests: dict[str, Manifest], model: str) -> dict[str, Any]:
    """What was measured of a model on clean images; of one that was fine-tuned afterwards nothing is."""
    return next((m.metrics for m in _evaluations(manifests, model) if m.stage == "evaluate"), {})


def _others(manifests: dict[str, Manifest], model: str) -> dict[str, float]:
    """The numbers that stand for the other evaluations of a model."""
    found = [headline_of(m) for m in _evaluations(manifests, model) if m.stage != "evaluate"]
    return {headline.title: headline.value for headline in found if headline is not None}


def _numbers_of(manifests: dict[str, Manifest], model: str) -> dict[str, Any]:
    """All numbers that were measured of a model, by the evaluators' short names."""
    found = [m for m in _evaluations(manifests, model) if m.stage in EVALUATORS]
    return {EVALUATORS[m.stage].short: _numbers(m.metrics) for m in found}


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers among an evaluation's metrics, in their sections; words and lists are left out."""
    own = {name: _numbers(value) if isinstance(value, dict) else value for name, value in metrics.items()}
    return {
        name: value
        for name, value in own.items()
        if isinstance(value, int | float) or (value and isinstance(value, dict))
    }


def _evaluations(manifests: dict[str, Manifest], model: str) -> list[Manifest]:
    return [m for m in manifests.values() if m.kind == "evaluation" and m.inputs.get("model") == model]


def _order(name: str) -> tuple[int, bool]:
    iteration, role = name.split("/")
    return int(iteration), role == "finetune"
