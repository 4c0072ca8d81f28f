"""The card of an exported model: Hugging Face's front matter, then what the store's records say of it, and nothing else.

Every number is one of a manifest; what no record tells is left out or said to be unknown. huggingface_hub writes the front
matter and reads the finished card again.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import configs
from models.configs import SMALL_IMAGE_NETWORKS, TrainConfig
from models.pretrained import CONFIG_FILE, HUB, LOCAL
from storage.artifacts import SOURCE_ROLE, Manifest
from storage.lineage import Lineage, LineageNode, read_lineage
from storage.objects import Store
from storage.runs import RunRecord, read_run
from tasks.comparison.compare import Group, evaluations_of
from tasks.inspection.facts import artifact_facts, code_of, tested_top1
from tasks.label import model_roles
from tasks.markdown import escaped
from tasks.selection.config import SelectConfig
from tasks.sources.torchvision import TorchvisionConfig

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TEMPLATE = "model_card.md.j2"
TASK = "image-classification"
TAGS = [TASK, "timm", "noisy-student-training"]
VARIANTS = Path(configs.__file__).with_name("variants.py")  # a model of our networks takes this file along
MOST_CLASSES = 40  # that are listed by name
# where the hub has the images that a source of ours reads
HUB_DATASETS = {
    "CIFAR10": "uoft-cs/cifar10",
    "CIFAR100": "uoft-cs/cifar100",
    "SVHN": "ufldl-stanford/svhn",
    "digits": "ylecun/mnist",
}

Row = dict[str, Any]


def model_card(store: Store, ref: str, model: Manifest) -> str:
    """The README.md of the model artifact that is known as `ref`. Raises StoreError on damaged records."""
    from huggingface_hub import ModelCard, ModelCardData

    lineage = read_lineage(store)
    groups = [group for group in evaluations_of(store, {ref: model}) if group.measures]
    results = [result for group in groups for result in _results(lineage, ref, group)]
    front = ModelCardData(
        library_name="timm",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=sorted({name for data in _made_from(lineage, model, "dataset") if (name := _hub_name(data))}) or None,
        base_model=_base_model(model),
        metrics=["accuracy"] if results else None,
        model_name=ref if results else None,
        eval_results=results or None,
    )
    text = _render(_page(store, lineage, ref, model, groups))
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}"))


def _page(store: Store, lineage: Lineage, ref: str, model: Manifest, groups: Sequence[Group]) -> Row:
    """What the template is filled with."""
    with store.local_copy(model.file(CONFIG_FILE)) as path:
        described = json.loads(path.read_text())
    names = model.metrics["class_names"]
    return {
        "ref": ref,
        "model": model,
        "what": _what(lineage, model),
        "own_network": described["architecture"] in SMALL_IMAGE_NETWORKS,
        "architecture": described["architecture"],
        "input": described["pretrained_cfg"],
        "classes": names[:MOST_CLASSES],
        "num_classes": len(names),
        "groups": [{"evaluator": g.evaluator, "of": g.of, "key": g.manifests[ref].key, "measures": g.measures} for g in groups],
        "clean": next((g.manifests[ref].metrics["test"] for g in groups if _is_own_test(g.manifests[ref], model)), None),
        "training": TrainConfig.model_validate(model.config) if "model" in model.config else None,
        "settings": json.dumps(_without_folder(model.config), indent=1, ensure_ascii=False),
        "run": _first_run(store, lineage.nodes[model.key], ref),
        "datasets": [_made(node) for node in _made_from(lineage, model, "dataset")],
        "labels": [_labels(lineage, node) for node in _made_from(lineage, model, "labels")],
        "selections": [_selection(node) for node in _made_from(lineage, model, "selection")],
        "models": [_network(lineage, node) for node in _made_from(lineage, model, "model")],
        "code": code_of(model),
        "provenance": model.provenance,
    }  # fmt: skip


def _what(lineage: Lineage, model: Manifest) -> str:
    """What the model is among those of Noisy Student Training, in a sentence."""
    if "selection" in model.inputs:
        return "A student: it was trained on labeled images and on images that carry a teacher's pseudo-labels."
    if "initial" in model.inputs:
        first = lineage.nodes[model.inputs["initial"]]
        return f"Fine-tuned on labeled images from the weights of `{first.name}` (`{first.key}`)."
    if "data" in model.inputs:
        return "Trained on labeled images alone, as a teacher or for comparison."
    return "Weights from outside, taken as they are: nothing was trained here, so no record tells how they were made."


def _made_from(lineage: Lineage, model: Manifest, kind: str) -> list[LineageNode]:
    """The artifacts of a kind that the model was made from, over any number of steps, in an order of making."""
    layers = lineage.layers(lineage.ancestors(model.key))
    keys = sorted(layers, key=lambda key: (layers[key], lineage.nodes[key].name))
    return [lineage.nodes[key] for key in keys if lineage.nodes[key].kind == kind]


def _made(node: LineageNode) -> Row:
    """An artifact in a few words: its name, key, what matters of it, whether it is still there."""
    return {
        "name": node.name,
        "key": node.key,
        "facts": artifact_facts(node.manifest) if node.manifest else "",
        "state": node.state.value,
    }


def _network(lineage: Lineage, node: LineageNode) -> Row:
    network = (node.manifest.config if node.manifest else {}).get("model", {}).get("name", "")
    return {**_made(node), "network": network, "top1": tested_top1(lineage, node.key)}


def _labels(lineage: Lineage, node: LineageNode) -> Row:
    teachers = [lineage.nodes[node.inputs[role]] for role in model_roles(node.inputs)]
    noised = bool(node.manifest and node.manifest.config.get("noised"))
    return {**_made(node), "teachers": [(t.name, t.key) for t in teachers], "noised": noised}


def _selection(node: LineageNode) -> Row:
    """A selection's rule, its counts and the class of which it has the fewest images; None where they are not recorded."""
    metrics = node.manifest.metrics if node.manifest else {}
    if node.manifest is None or "per_class" not in metrics:
        return {**_made(node), "settings": None}
    kept = metrics["per_class"]["kept"]
    least = min(range(len(kept)), key=lambda number: kept[number])
    return {
        **_made(node),
        "settings": SelectConfig.model_validate(node.manifest.config),
        "counts": {name: metrics[name] for name in ("labeled", "kept", "dropped", "duplicated", "total")},
        "least": (metrics["class_names"][least], kept[least]),
        "empty": sum(not count for count in kept),
    }


def _is_own_test(evaluation: Manifest, model: Manifest) -> bool:
    """Whether it is of the clean test images that belong to the model's own training data."""
    return evaluation.stage == "evaluate" and evaluation.inputs["data"] == model.inputs.get("data")


def _results(lineage: Lineage, ref: str, group: Group) -> "list[EvalResult]":
    """An evaluation's numbers for the front matter: shares in [0, 1]. The revision is the data's key or fingerprint."""
    from huggingface_hub import EvalResult

    made = group.manifests[ref]
    data = lineage.nodes.get(made.inputs.get("data", ""))
    settings = " ".join([group.evaluator, *(f"{name}={json.dumps(value)}" for name, value in made.config.items())])
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=(_hub_name(data) if data else None) or "custom",
            dataset_name=data.name if data else group.evaluator,
            dataset_config=settings,
            dataset_split=made.metrics.get("split", "test"),
            dataset_revision=made.inputs.get("data") or made.inputs.get(SOURCE_ROLE),
            metric_type="accuracy" if measure.better == "larger" else _slug(measure.name),
            metric_name=measure.name,
            metric_value=measure.values[ref].value,
        )
        for measure in group.measures
    ]


def _hub_name(data: LineageNode) -> str:
    """The hub's name of the images that a data set was made from; empty where they are one's own."""
    config = data.manifest.config if data.manifest else {}
    if config.get("source") == "torchvision":
        return HUB_DATASETS[TorchvisionConfig.model_validate(config.get("torchvision", {})).dataset]
    return HUB_DATASETS.get(config.get("source", ""), "")


def _base_model(model: Manifest) -> str | None:
    """The hub's name of the weights that it started from; None where there are none, or they lie in a folder."""
    source = str(model.config.get("pretrained") or model.metrics.get("pretrained") or "")
    if not source or source.startswith(LOCAL):
        return None
    return source.removeprefix(HUB).partition("@")[0] if source.startswith(HUB) else f"timm/{source}"


def _without_folder(config: Row) -> Row:
    """Settings without the place of a folder of weights on the machine where it was trained."""
    if str(config.get("pretrained", "")).startswith(LOCAL):
        return {**config, "pretrained": f"{LOCAL}{Path(config['pretrained']).name}"}
    return config


def _first_run(store: Store, node: LineageNode, ref: str) -> RunRecord | None:
    """The oldest run of the ref's experiment that has the model, else of another; None where it was made outside of any."""
    if not node.runs:
        return None
    own = [run for run in node.runs if run.split("/")[0] == ref.split("/")[0]] or node.runs
    experiment, number, *_ = own[-1].split("/")
    return read_run(store, f"{experiment}/{number}")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _render(page: Row) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=False,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        text=escaped, count=lambda value: f"{value:,}", percent=lambda value: f"{100 * value:.2f}"
    )
    return environment.get_template(TEMPLATE).render(page)
