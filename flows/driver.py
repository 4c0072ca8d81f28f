"""One run of an experiment, whoever asks for it: record it, check it against the data, do stage after stage.

Knows neither Prefect nor the terminal: `do_stage` says how a stage is carried out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from flows.experiment import Experiment
from flows.graph import ROLES, STAGES, Node, build_graph, made_from, resolve_keys
from flows.openlineage_sender import announced, open_client
from models.compute import open_engine
from models.launch import warm_up
from models.pretrained import locate
from models.versions import package_versions
from storage.artifacts import Manifest, find, find_part, publish_part
from storage.errors import UserError
from storage.keys import digest
from storage.leases import at_work
from storage.objects import Store
from storage.runs import NodeRecord, RunRecord, latest_run, record_run, set_ref
from storage.shards import shard_files
from tasks.evaluators.contract import EvaluatorConfig
from tasks.ingest import fingerprint, open_source
from tasks.sources import LABELED_SPLITS, SPLITS, SourceFile
from tasks.stage import DoStage, StageOutcome, StageRequest, missing_inputs
from tasks.train import check_batches, check_compute, check_unlabeled_batch

NEED_TORCH = ("model", "labels", "evaluation")  # kinds of artifacts whose stages run a network


@dataclass(frozen=True)
class Rerun:
    """A forced rerun: a role, of one iteration or of all; the empty role forces nothing."""

    role: str = ""
    iteration: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Rerun":
        """`select` or `2/select`. Raises UserError naming the stages there are."""
        if text in ("", "nothing"):
            return cls()
        iteration, _, role = text.rpartition("/")
        if role not in ROLES or (iteration and not iteration.isdecimal()):
            raise UserError(
                f"--rerun {text}: no such stage; choose from {', '.join(ROLES)}, or of one iteration: 2/select"
            )
        return cls(role, int(iteration) if iteration else None)

    def covers(self, node: Node) -> bool:
        """Whether this node is to be made anew."""
        iteration = node.name.rpartition("/")[0]
        return bool(self.role) and node.role == self.role and self.iteration in (None, int(iteration or -1))


@dataclass
class Run:
    """An experiment made concrete: its nodes with their keys, and the sources' listing."""

    experiment: Experiment
    recipe: str
    store: Store
    nodes: list[Node]
    records: dict[str, NodeRecord]
    sources: list[SourceFile]
    prefect_run: str = ""
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def draft_record(self) -> RunRecord:
        """The run record, not yet numbered."""
        return RunRecord(
            experiment=self.experiment.name,
            number=0,
            recipe=self.recipe,
            config=self.experiment.model_dump(mode="json"),
            sources={f"{file.split}: {file.name}": file.sha256[:16] for file in self.sources},
            nodes=tuple(self.records[node.name] for node in self.nodes),
            prefect_run=self.prefect_run,
        )


def list_sources(experiment: Experiment) -> list[SourceFile]:
    """Every file of the experiment's data with its fingerprint. Raises UserError where there is none."""
    return open_source(experiment.data).files(SPLITS)


def resolve_run(
    experiment: Experiment,
    recipe: str,
    store: Store,
    rerun: Rerun,
    prefect_run: str = "",
    sources: Sequence[SourceFile] | None = None,
) -> Run:
    """List the sources (unless they were: `sources`) and give every stage its key. Writes nothing.

    Generations follow the newest run; `rerun` raises those it covers, once: a Prefect run that is retried goes on with
    the generations that it recorded itself.
    """
    nodes = build_graph(experiment)
    if rerun.role and not any(rerun.covers(node) for node in nodes):
        named = ", ".join(node.name for node in nodes)
        raise UserError(f"--rerun: this experiment has no such stage; it has {named}")
    latest = latest_run(store, experiment.name)
    generations = dict(latest.generations) if latest else {}
    retried = latest is not None and prefect_run != "" and latest.prefect_run == prefect_run
    if not retried:
        for node in nodes:
            if rerun.covers(node):
                generations[node.name] = generations.get(node.name, 0) + 1
    sources = list_sources(experiment) if sources is None else list(sources)
    fingerprints = {
        "prepare": fingerprint([file for file in sources if file.split in LABELED_SPLITS]),
        "unlabeled": fingerprint([file for file in sources if file.split not in LABELED_SPLITS]),
    }
    for pretrained in {node.source for node in nodes if node.stage == "train"} - {"train"}:
        fingerprints[pretrained] = locate(pretrained).fingerprint()
    for node in nodes:
        if isinstance(node.config, EvaluatorConfig) and node.config.external() and node.source not in fingerprints:
            fingerprints[node.source] = node.config.fingerprint()
    records = resolve_keys(nodes, fingerprints, generations)
    return Run(experiment, recipe, store, nodes, {r.name: r for r in records}, sources, prefect_run)


def find_node(run: Run, name: str) -> Node:
    """The stage of that name. Raises UserError naming those there are."""
    for node in run.nodes:
        if node.name == name:
            return node
    raise UserError(f"this experiment has no stage {name!r}; it has {', '.join(node.name for node in run.nodes)}")


def execute(run: Run, do_stage: DoStage, only: Collection[str] | None = None) -> RunRecord:
    """Do every stage in order (`only`: these, with their inputs), check what can be checked before training, set the refs."""
    client = open_client()
    run.store.check_writable()
    nodes = run.nodes if only is None else made_from(run.nodes, only)
    with at_work(run.store, run.experiment.name):
        record = record_run(run.store, run.draft_record())
        records = [run.records[node.name] for node in nodes]
        missing = {r.kind for r in records if find(run.store, r.kind, r.key) is None}
        if missing:
            open_engine(run.experiment.compute).check(run.store.url)
        if missing & set(NEED_TORCH) and run.experiment.compute.engine == "local":
            warm_up()
        with announced(client, run.store, run.experiment.name, do_stage, record.name) as do_announced:
            for node in nodes:
                execute_node(run, node, do_announced)
                if node.stage == "unlabeled":  # both data sets are there
                    preflight(run)
    return record


def execute_one(run: Run, name: str, do_stage: DoStage) -> StageOutcome:
    """Do one stage of a run. Raises UserError naming the stages to run first where its inputs are not there."""
    node, client = find_node(run, name), open_client()
    run.store.check_writable()
    if find(run.store, run.records[name].kind, run.records[name].key) is None:
        open_engine(run.experiment.compute).check(run.store.url)
    with (
        at_work(run.store, f"{run.experiment.name}/{name}"),
        announced(client, run.store, run.experiment.name, do_stage) as do_announced,
    ):
        return execute_node(run, node, do_announced)


def input_kinds(run: Run, node: Node) -> dict[str, str]:
    """The kind of artifact of each input of a stage, by role."""
    by_name = {other.name: other for other in run.nodes}
    return {role: STAGES[by_name[name].stage].kind for role, name in node.inputs.items()}


def execute_node(run: Run, node: Node, do_stage: DoStage) -> StageOutcome:
    """Do one stage whose inputs are there. Raises UserError naming the stages to run first where they are not."""
    kinds = input_kinds(run, node)
    missing = missing_inputs(run.store, run.records[node.name], kinds)
    if missing:
        first = ", ".join(node.inputs[role] for role in missing)
        raise UserError(f"{node.name} needs {first}, not made yet for this config; run that first, or `nst run`")
    stage = STAGES[node.stage]
    outcome = do_stage(
        StageRequest(
            store=run.store.url,
            record=run.records[node.name],
            stage=stage,
            config=node.config,
            input_kinds=kinds,
            compute=run.experiment.compute,
            prefect_run=run.prefect_run,
        )
    )
    run.manifests[node.name] = outcome.manifest
    set_ref(run.store, f"{run.experiment.name}/{node.name}", stage.kind, outcome.manifest.key)
    return outcome


def preflight(run: Run) -> None:
    """Check every network against the data and against each other, before the first of them is trained.

    Raises UserError on a batch larger than the data, a network that timm cannot build, a student smaller than its
    teacher. Skipped where every network is there already.
    """
    training = [node for node in run.nodes if node.stage == "train"]
    if all(find(run.store, "model", run.records[node.name].key) is not None for node in training):
        return
    data = run.manifests["prepare"]
    networks = run.experiment.networks()
    for field_name, config in networks.items():
        check_batches(config, field_name, data)
        check_compute(config, field_name, run.experiment.compute)
    most = _most_selected(run, run.manifests["unlabeled"])
    for number, student in enumerate(run.experiment.iterations, start=1):
        check_unlabeled_batch(student, f"iterations.{number}", most, "a selection holds at most")
    counts = _count_parameters(run, len(data.metrics["class_names"]))
    teacher = "teacher"
    for number, student in enumerate(run.experiment.iterations, start=1):
        own, others = counts[f"iterations.{number}.model"], counts[f"{teacher}.model"]
        if own < others and not student.allow_smaller:
            raise UserError(
                f"iterations.{number}.model: this student has {own:,} parameters, its teacher ({teacher}) {others:,}; the "
                "method wants an equal or larger student. Choose a larger network or set student.allow_smaller=true"
            )
        teacher = f"iterations.{number}"


def _most_selected(run: Run, data: Manifest) -> int:
    """How many unlabeled images, with duplicates, a selection of this data can hold."""
    config = run.experiment.select
    if config.balance:
        return config.images_per_class * len(data.metrics["class_names"])
    return sum(shard.rows or 0 for shard in shard_files(data, "unlabeled"))


def _count_parameters(run: Run, num_classes: int) -> dict[str, int]:
    """The parameters of each network, by its place in the recipe. Remembered in the store: timm loads in seconds."""
    models = {f"{name}.model": c.model.model_dump(mode="json") for name, c in run.experiment.networks().items()}
    spec, versions = {"models": models, "num_classes": num_classes}, package_versions(("torch", "timm"))
    key = digest(spec)
    known = find_part(run.store, "inspect", key, versions)
    if known is None:
        engine = open_engine(run.experiment.compute)
        (facts,) = engine.map("models.zoo:inspect_models", [spec], lambda progress: None)
        known = publish_part(run.store, "inspect", key, versions, {}, facts)
    counts: dict[str, int] = known.facts["num_parameters"]
    return counts
