"""The runs of a study: what they share and what has to be made, making it, and reading the numbers from the store.

Knows neither Prefect nor the terminal, and loads no torch until a run begins.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flows.driver import Rerun, Run, execute, list_sources, resolve_run
from flows.graph import STAGES, resolve_keys
from flows.studies import Grid, GridRun, Images, StudyScale
from flows.study_cost import gpu_days
from flows.study_table import Failure, Measurements
from models.failures import WorkerFailed
from storage.artifacts import Manifest, find
from storage.errors import StoreError, UserError
from storage.keys import digest
from storage.objects import Store
from storage.runs import NodeRecord, RunRecord, list_runs
from tasks.results import result_records
from tasks.sources import SourceFile
from tasks.stage import DoStage

ONLY_UNLABELED = {"unlabeled", "unlabeled_root", "in_place", "leaks"}


@dataclass(frozen=True)
class VariantPlan:
    """A variant's stages over all seeds: how many, how many of them in common with others, in the store, to be made."""

    name: str
    stages: int
    shared: int
    present: int
    missing: int


@dataclass(frozen=True)
class StudyPlan:
    """What a study needs. Each artifact is counted once, however many runs need it; `shared`: by two variants or more."""

    runs: int
    stages: int
    distinct: int
    shared: int
    present: int
    missing: dict[str, int]
    variants: tuple[VariantPlan, ...]
    gpu_days: float | None
    gpu_days_missing: float | None
    note: str = ""


def resolve_all(grid: Grid, store: Store) -> list[tuple[GridRun, Run]]:
    """Every run with its keys; data that several have in common is listed once. Writes nothing."""
    listings: dict[str, list[SourceFile]] = {}
    found = []
    for run in grid.runs:
        data = run.experiment.data.model_dump_json()
        if data not in listings:
            listings[data] = list_sources(run.experiment)
        found.append((run, resolve_run(run.experiment, run.recipe, store, Rerun(), sources=listings[data])))
    return found


def keys_without_data(run: GridRun) -> dict[str, NodeRecord]:
    """Keys that tell what two runs share, without a look at the data: its settings stand for it."""
    data = run.experiment.data.model_dump(mode="json")
    labeled = {name: value for name, value in data.items() if name not in ONLY_UNLABELED}
    fingerprints = {"prepare": digest(labeled), "unlabeled": digest(data)}
    weights = {node.source for node in run.graph if node.stage == "train"} - {"train"}
    fingerprints |= {source: digest(source) for source in weights}
    return {record.name: record for record in resolve_keys(list(run.graph), fingerprints, {})}


def count_together(grids: Sequence[Grid]) -> tuple[int, int, int]:
    """Of several studies in one store: runs, stages, and distinct artifacts, told apart by settings without data."""
    runs = [run for grid in grids for run in grid.runs]
    keyed = [(run, keys_without_data(run)) for run in runs]
    distinct = {records[node.name].key for run, records in keyed for node in run.needed}
    return len(runs), sum(len(run.needed) for run in runs), len(distinct)


def plan_study(grid: Grid, store: Store | None) -> StudyPlan:
    """Count the artifacts of a study; those that the store has, where the data is there to tell. Writes nothing."""
    resolved, note = [(run, keys_without_data(run)) for run in grid.runs], ""
    if store is not None:
        try:
            resolved = [(run, made.records) for run, made in resolve_all(grid, store)]
        except StoreError:
            raise
        except UserError as error:
            store, note = None, f"nothing was looked up in the store, because the data is not there: {error}"
    kinds: dict[str, str] = {}
    users: dict[str, set[str]] = {}
    for run, records in resolved:
        for node in run.needed:
            key = records[node.name].key
            kinds[key] = node.stage
            users.setdefault(key, set()).add(run.variant)
    present = {k for k, stage in kinds.items() if store is not None and find(store, STAGES[stage].kind, k) is not None}
    missing = Counter(stage for key, stage in kinds.items() if key not in present)
    return StudyPlan(
        runs=len(resolved),
        stages=sum(len(run.needed) for run, _ in resolved),
        distinct=len(kinds),
        shared=sum(len(variants) > 1 for variants in users.values()),
        present=len(present),
        missing={stage: missing[stage] for stage in STAGES if missing[stage]},
        variants=tuple(_variant_plans(resolved, users, present)),
        gpu_days=_cost(grid.scale, resolved, set()),
        gpu_days_missing=_cost(grid.scale, resolved, present),
        note=note,
    )


def run_study(
    grid: Grid, store: Store, do_stage: DoStage, announce: Callable[[GridRun, int, int], None]
) -> list[Failure]:
    """Do every run, seed by seed; the failures. One that fails does not stop the others; a store that is gone does.

    announce: called before each run with its number, from 1, and the number of all.
    """
    failures = []
    resolved = resolve_all(grid, store)
    store.check_writable()
    for number, (grid_run, run) in enumerate(resolved, start=1):
        announce(grid_run, number, len(resolved))
        try:
            execute(run, do_stage, grid_run.targets)
        except Exception as error:
            store.check_writable()  # raises where it is the store that failed: so would every other run
            known = isinstance(error, UserError | WorkerFailed)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            failures.append(Failure(grid_run.variant, grid_run.seed, text))
    return failures


def read_measurements(grid: Grid, store: Store) -> Measurements:
    """The numbers of every row and seed, from the evaluations in the store: of the newest run with these very settings."""
    records: dict[tuple[str, int], list[dict[str, object]]] = {}
    notes: dict[tuple[str, int], str] = {}
    artifacts: dict[tuple[str, int], list[Manifest]] = {}
    for run in grid.runs:
        done = list_runs(store, run.experiment.name)
        same = next((record for record in reversed(done) if _is_run_of(record, run)), None)
        if same is None:
            notes[run.variant, run.seed] = "was run with other settings" if done else "was not run yet"
            continue
        nodes = [node for node in same.nodes if node.name in {needed.name for needed in run.needed}]
        manifests = {n.name: m for n in nodes if (m := find(store, n.kind, n.key)) is not None}
        artifacts[run.variant, run.seed] = list(manifests.values())
        records[run.variant, run.seed] = result_records(run.experiment.name, manifests)
        if len(manifests) < len(nodes):
            notes[run.variant, run.seed] = "is not finished"
    return Measurements(records, notes, artifacts)


def _is_run_of(record: RunRecord, run: GridRun) -> bool:
    """Whether a recorded run did the needed stages with the settings of `run` (data and versions may have changed)."""
    for node in run.needed:
        then = record.node(node.name)
        if then is None or then.stage != node.stage or then.config != node.config.key_fields():
            return False
        if set(node.inputs) - set(then.inputs):
            return False
    return True


def _variant_plans(
    resolved: Sequence[tuple[GridRun, dict[str, NodeRecord]]], users: dict[str, set[str]], present: set[str]
) -> Iterator[VariantPlan]:
    by_variant: dict[str, set[str]] = {}
    for run, records in resolved:
        by_variant.setdefault(run.variant, set()).update(records[node.name].key for node in run.needed)
    for name, keys in by_variant.items():
        shared = sum(len(users[key]) > 1 for key in keys)
        yield VariantPlan(name, len(keys), shared, len(keys & present), len(keys - present))


def _cost(
    scale: StudyScale, resolved: Sequence[tuple[GridRun, dict[str, NodeRecord]]], present: set[str]
) -> float | None:
    """GPU-days of what is not present; None where the scale does not ask for it."""
    by_name: dict[str, Images | None] = {variant.name: variant.images or scale.images for variant in scale.variants}
    needed = []
    for run, records in resolved:
        images = by_name[run.variant]
        if images is None:
            return None
        graph = {node.name: node for node in run.graph}
        keyed = ((records[node.name].key, node) for node in run.needed)
        needed += [(key, node, graph, images) for key, node in keyed if key not in present]
    return gpu_days(needed)
