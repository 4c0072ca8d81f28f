"""The graph of an experiment: which stages, with which config, from which inputs; and their keys, before anything runs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flows.experiment import Experiment
from models.configs import TrainConfig
from storage.artifacts import SOURCE_ROLE
from storage.keys import Config, artifact_key
from storage.runs import NodeRecord
from tasks import imported, label, prepare, report, select, testset, train, unlabeled
from tasks.contract import Stage
from tasks.evaluators import BY_SHORT, EVALUATORS
from tasks.evaluators.contract import EvaluatorConfig
from tasks.selection.config import SelectConfig

STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", prepare.VERSION, "dataset", prepare.PrepareConfig, prepare.prepare),
        Stage("unlabeled", unlabeled.VERSION, "dataset", unlabeled.UnlabeledConfig, unlabeled.unlabeled),
        Stage("train", train.VERSION, "model", TrainConfig, train.train),
        Stage("label", label.VERSION, "labels", label.LabelConfig, label.label),
        Stage("select", select.VERSION, "selection", SelectConfig, select.select),
        *EVALUATORS.values(),
        Stage("import", imported.VERSION, "model", imported.ImportConfig, imported.import_model),
        Stage("testset", testset.VERSION, "dataset", testset.TestsetConfig, testset.testset),
        Stage("report", report.VERSION, "report", report.ReportConfig, report.report),
    )
}
ROLES = (
    "prepare", "unlabeled", "teacher", "selector", "label", "select", "student", "finetune", *EVALUATORS, "report",
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One stage of an experiment. Its name is `prepare`, `unlabeled`, `report` or `<iteration>/<role>`; inputs are names of nodes."""

    name: str
    stage: str
    config: Config
    inputs: dict[str, str]

    @property
    def role(self) -> str:
        """The part of the name that `--rerun` takes: teacher, label, select and so on."""
        return self.name.rpartition("/")[2]

    @property
    def section(self) -> str:
        """Where the node's config stands in a recipe, for messages: `teacher`, `iterations.2`, `select`."""
        iteration, _, role = self.name.rpartition("/")
        sections = {"prepare": "data", "unlabeled": "data", "student": f"iterations.{iteration}"}
        sections |= {name: f"evaluate.{evaluator.short}" for name, evaluator in EVALUATORS.items()}
        sections["finetune"] = f"iterations.{iteration}.finetune" if iteration != "0" else "teacher.finetune"
        return sections.get(role, role)

    @property
    def source(self) -> str:
        """What names the external data that the stage reads: the stage, a training's pretrained weights, an archive."""
        if isinstance(self.config, EvaluatorConfig):
            return self.config.external() or self.stage
        return getattr(self.config, "pretrained", "") or self.stage


def build_graph(experiment: Experiment) -> list[Node]:
    """The nodes in an order in which each follows its inputs."""
    nodes = [
        Node("prepare", "prepare", prepare.PrepareConfig(**dict(experiment.data)), {}),
        Node("unlabeled", "unlabeled", unlabeled.UnlabeledConfig(**dict(experiment.data)), {"data": "prepare"}),
        *_network("0/teacher", experiment.teacher.as_teacher(), {}),
    ]
    models = [nodes[-1].name]
    nodes += _evaluations(experiment, 0, models[0])
    if experiment.order == "once":
        selector = models[0]
        if experiment.selector is not None:
            selector = "0/selector"
            nodes.append(Node(selector, "train", experiment.selector.as_teacher(), {"data": "prepare"}))
        nodes.append(Node("0/label", "label", experiment.label, {"data": "unlabeled", "model": selector}))
        nodes.append(Node("0/select", "select", experiment.select, {"data": "unlabeled", "labels": "0/label"}))
    for number, student in enumerate(experiment.iterations, start=1):
        inputs = {"data": "unlabeled", **_teachers(experiment, models)}
        online = student.pseudo_label_source == "online"
        if experiment.order == "once":
            sources = {"selection": "0/select"}
            if not online:  # a teacher that works within the step needs no stored labels of the selected images
                nodes.append(Node(f"{number}/label", "label", experiment.label, {**inputs, "selection": "0/select"}))
                sources["labels"] = f"{number}/label"
        else:
            nodes.append(Node(f"{number}/label", "label", experiment.label, inputs))
            chosen = {"data": "unlabeled", "labels": f"{number}/label"}
            nodes.append(Node(f"{number}/select", "select", experiment.select, chosen))
            sources = {"selection": f"{number}/select"}
        sources |= {train.TEACHER_ROLE: models[-1]} if online else {}
        sources |= {train.INITIAL_ROLE: models[-1]} if student.init == "model" else {}
        nodes += _network(f"{number}/student", student, sources)
        models.append(nodes[-1].name)
        nodes += _evaluations(experiment, number, models[-1])
    everything = {node.name: node.name for node in nodes}
    nodes.append(Node("report", "report", report.ReportConfig(experiment=experiment.name), everything))
    return nodes


def resolve_keys(
    nodes: list[Node], fingerprints: Mapping[str, str], generations: Mapping[str, int]
) -> list[NodeRecord]:
    """The identity of each node, in the order of `nodes`. `fingerprints`: of the files that a node reads, by its source."""
    keys: dict[str, str] = {}
    records = []
    for node in nodes:
        stage = STAGES[node.stage]
        inputs = {role: keys[name] for role, name in node.inputs.items()}
        if node.source in fingerprints:
            inputs[SOURCE_ROLE] = fingerprints[node.source]
        generation = generations.get(node.name, 0)
        config = node.config.key_fields()
        keys[node.name] = artifact_key(stage.name, stage.version, config, inputs, generation)
        records.append(
            NodeRecord(
                name=node.name,
                stage=stage.name,
                kind=stage.kind,
                key=keys[node.name],
                version=stage.version,
                generation=generation,
                config=config,
                inputs=inputs,
            )
        )
    return records


def made_from(nodes: list[Node], names: Collection[str]) -> list[Node]:
    """The named nodes and all that they are made from, in the order of `nodes`."""
    needed = set(names)
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs.values())
    return [node for node in nodes if node.name in needed]


def evaluations_of(nodes: list[Node], network: str) -> list[str]:
    """The names of the nodes that measure a network, such as `1/student`."""
    return [n.name for n in nodes if STAGES[n.stage].kind == "evaluation" and n.inputs.get("model") == network]


def _teachers(experiment: Experiment, models: list[str]) -> dict[str, str]:
    """The roles of the models that label together, the newest first: model, model.2, model.3 ..."""
    newest = models[::-1][: experiment.label.num_teachers]
    return {f"model.{place}" if place > 1 else "model": name for place, name in enumerate(newest, start=1)}


def _network(name: str, config: TrainConfig, sources: dict[str, str]) -> list[Node]:
    """The training of a network, and its fine-tuning where it has one: the last node is the network."""
    inputs = {"data": "prepare", **sources}
    if config.finetune is None:
        return [Node(name, "train", config, inputs)]
    finetune = f"{name.partition('/')[0]}/finetune"
    return [
        Node(name, "train", config.without_finetune(), inputs),
        Node(finetune, "train", config.finetuning(), {"data": "prepare", train.INITIAL_ROLE: name}),
    ]


def _evaluations(experiment: Experiment, number: int, model: str) -> list[Node]:
    """The evaluators that the recipe asks for, of one model."""
    nodes = []
    for short, config in experiment.evaluate.asked().items():
        evaluator = BY_SHORT[short]
        inputs = {"data": "prepare"} if evaluator.data else {}
        nodes.append(Node(f"{number}/{evaluator.name}", evaluator.name, config, {**inputs, "model": model}))
    return nodes
