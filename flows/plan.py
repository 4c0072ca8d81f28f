"""`nst plan`: what a run would do, stage by stage, and why, without doing anything. Imports no torch and no Prefect."""

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from flows.driver import Run, input_kinds
from flows.graph import STAGES, Node
from models.configs import TrainConfig
from models.launch import code_state
from storage.artifacts import SOURCE_ROLE, Manifest, find
from storage.cache import node_cache
from storage.errors import UserError
from storage.runs import NodeRecord, RunRecord, latest_run
from tasks.selection.config import SelectConfig
from tasks.selection.rules import count_classes
from tasks.selection.scan import Predictions
from tasks.stage import missing_inputs
from tasks.train import check_batches


@dataclass(frozen=True)
class PlannedSelection:
    """What a selection will do, a dict a class (`ClassCounts.table`); or the problem that will end it."""

    classes: tuple[dict[str, Any], ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class PlanRow:
    """One stage: its key, whether it is there (`reused`) or `will run`, and why.

    A selection that will run has its counts, where the labels that it selects from are there. `problem`: what will end a
    training, as far as the data that is there can tell.
    """

    name: str
    key: str
    status: str
    reasons: tuple[str, ...]
    selection: PlannedSelection | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as plain JSON values; without `selection` and `problem` where it has none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def make_plan(run: Run) -> list[PlanRow]:
    """Compare the run with the store and with the experiment's newest run record."""
    previous = latest_run(run.store, run.experiment.name)
    rows: list[PlanRow] = []
    changed: set[str] = set()
    for node in run.nodes:
        record = run.records[node.name]
        before = previous.node(node.name) if previous else None
        if before is None or before.key != record.key:
            changed.add(node.name)
        manifest = find(run.store, record.kind, record.key)
        if manifest is not None:
            rows.append(PlanRow(node.name, record.key, "reused", _notes(manifest)))
            continue
        reasons = _reasons(run, node, record, before, previous, changed)
        selection, problem = _planned_selection(run, node), _training_problem(run, node)
        rows.append(PlanRow(node.name, record.key, "will run", reasons, selection, problem))
    return rows


def _planned_selection(run: Run, node: Node) -> PlannedSelection | None:
    """Read the predictions, as often as the selection will; what memory shall not hold goes to the cache's disk, not into the store."""
    if node.stage != "select":
        return None
    labels = find(run.store, "labels", run.records[node.inputs["labels"]].key)
    if labels is None:
        return None
    with node_cache().private_folder() as scratch:
        predictions = Predictions(run.store, labels, scratch)
        try:
            counts = count_classes(predictions, SelectConfig.model_validate(node.config))
        except UserError as error:
            return PlannedSelection(problem=str(error))
    return PlannedSelection(tuple(counts.table(predictions.class_names).to_pylist()))


def _training_problem(run: Run, node: Node) -> str | None:
    """What is wrong with a training, where the data set that it learns from is there."""
    config = node.config
    data = find(run.store, "dataset", run.records["prepare"].key)
    try:
        if data is not None and isinstance(config, TrainConfig):
            check_batches(config, node.section, data)
    except UserError as error:
        return str(error)
    return None


def _notes(manifest: Manifest) -> tuple[str, ...]:
    """What to know of an artifact that is reused: that other code made it."""
    made_by, now = manifest.provenance.get("code", {}), code_state()
    if not made_by.get("commit") or made_by == now:
        return ()
    return (f"made by code {made_by['commit'][:10]}{' with changes' if made_by['dirty'] else ''}",)


def _reasons(
    run: Run, node: Node, record: NodeRecord, before: NodeRecord | None, previous: RunRecord | None, changed: set[str]
) -> tuple[str, ...]:
    """Why a stage has to run, by name: fields, files, inputs, version, rerun."""
    if before is None or previous is None:
        return ("never run before",)
    if before.key == record.key:
        absent = missing_inputs(run.store, record, input_kinds(run, node))
        return (f"waits for {', '.join(node.inputs[role] for role in absent)}" if absent else "was not finished",)
    reasons = _config_changes(node, before)
    if before.version != record.version:
        reasons.append(f"stage {record.stage} changed: version {before.version} -> {record.version}")
    if before.generation != record.generation:
        reasons.append(f"rerun asked for: generation {before.generation} -> {record.generation}")
    if before.inputs.get(SOURCE_ROLE) != record.inputs.get(SOURCE_ROLE):
        reasons += _source_changes(run, previous, node.stage)
    for name in node.inputs.values():
        if name in changed and node.stage != "report":
            reasons.append(f"input {name} is new")
    if node.stage == "report" and not reasons:
        reasons.append("its inputs are new")
    return tuple(reasons) or ("its inputs changed",)


def _config_changes(node: Node, before: NodeRecord) -> list[str]:
    """The fields that differ, named as in a recipe, with old and new value."""
    try:
        old = _flatten(STAGES[node.stage].config.model_validate(before.config).model_dump(mode="json"))
    except ValidationError:  # written by another version of the program
        old = _flatten(before.config)
    new = _flatten(node.config.model_dump(mode="json"))
    skipped = node.config.not_in_key
    names = [name for name in sorted(old.keys() | new.keys()) if name.split(".")[0] not in skipped]
    return [f"{node.section}.{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def _source_changes(run: Run, previous: RunRecord, stage: str) -> list[str]:
    """The files of a stage that are new, changed or gone since the last run."""
    now, then = (
        {n: sha for n, sha in found.items() if n.startswith("unlabeled: ") == (stage == "unlabeled")}
        for found in (run.draft_record().sources, previous.sources)
    )
    changes = [f"file {name} is new" for name in sorted(now.keys() - then.keys())]
    changes += [f"file {name} is gone" for name in sorted(then.keys() - now.keys())]
    return changes + [f"file {name} changed" for name in sorted(now.keys() & then.keys()) if now[name] != then[name]]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat.update(_flatten(item, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = item
    return flat
