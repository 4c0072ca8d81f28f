"""One evaluator on one model, outside of any experiment: a model artifact or a network of timm's, on a data set or a folder.

The artifact is the one that a recipe would make with the same settings, model and data: it is found, or made once. Knows neither
Prefect nor the terminal: `do_stage` says how a stage is carried out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.graph import STAGES
from flows.openlineage_sender import announced, open_client
from flows.overrides import apply_override, explain, split_override
from models.compute import ComputeConfig
from storage.artifacts import SOURCE_ROLE, Manifest, find
from storage.errors import UserError
from storage.keys import Config, artifact_key
from storage.leases import at_work
from storage.objects import Store
from storage.runs import NodeRecord, resolve_ref, set_ref
from tasks.contract import Stage
from tasks.evaluators import BY_SHORT, Evaluator
from tasks.evaluators.archives import ArchiveConfig
from tasks.evaluators.contract import EvaluatorConfig
from tasks.imported import ImportConfig
from tasks.stage import DoStage, StageRequest
from tasks.testset import TestsetConfig

OUTSIDE = ("local-dir:", "hf-hub:")  # how weights from outside are named, besides timm's NAME.TAG
SHORT_KEY = 12
REFS = "evaluations"  # where those of evaluations begin, as an experiment's do with its name


class _Overridden(Config):
    """What dotted overrides of `nst evaluate` may name beside the evaluator's own settings."""

    compute: ComputeConfig = ComputeConfig()


def find_evaluator(name: str) -> Evaluator:
    """The evaluator of that short name, `-` or `_`. Raises UserError naming those there are."""
    found = BY_SHORT.get(name.replace("-", "_"))
    if found is None:
        raise UserError(f"there is no evaluator {name!r}; there are {', '.join(BY_SHORT)}")
    return found


def evaluate(
    store: Store, evaluator: Evaluator, model: str, data: str, overrides: Sequence[str], do_stage: DoStage
) -> Manifest:
    """Run an evaluator. `model`: a ref, or weights from outside; `data`: a ref, a folder, or empty: what the model was trained with.

    Raises UserError on whatever does not fit, before a network is run.
    """
    config, compute = settings(evaluator, data, overrides)
    client = open_client()
    store.check_writable()
    with at_work(store, f"evaluate {evaluator.short}"), announced(client, store, REFS, do_stage) as do_stage:
        network = _model(store, model, compute, do_stage)
        inputs = {"model": network}
        if evaluator.data:
            inputs["data"] = _data(store, network, model, data, compute, do_stage)
        sources = {SOURCE_ROLE: config.fingerprint()} if config.external() else {}
        made = _do(store, evaluator, config, inputs, sources, compute, do_stage)
        set_ref(store, f"{REFS}/{evaluator.short}/{made.key[:SHORT_KEY]}", made.kind, made.key)
    return made


def settings(evaluator: Evaluator, data: str, overrides: Sequence[str]) -> tuple[EvaluatorConfig, ComputeConfig]:
    """The evaluator's settings and `compute`, from dotted overrides; of an archive's `data` is the root."""
    own: dict[str, Any] = {}
    general: dict[str, Any] = {}
    for text in overrides:
        dotted, value = split_override(text)
        if dotted.partition(".")[0] == "compute":
            apply_override(_Overridden, general, dotted, value, "override")
        else:
            apply_override(evaluator.config, own, dotted, value, "override")
    if issubclass(evaluator.config, ArchiveConfig) and data:
        own.setdefault("root", data)
    try:
        config = evaluator.config.model_validate(own)
        return config, _Overridden.model_validate(general).compute  # type: ignore[return-value]
    except ValidationError as error:
        raise UserError(explain(error, evaluator.config, evaluator.short)) from None


def is_outside(model: str) -> bool:
    """Whether a model's name means weights from outside and no ref, which has a slash and no dot before it."""
    return model.startswith(OUTSIDE) or ("/" not in model and "." in model)


def imported_ref(model: str) -> str:
    """Under which ref weights from outside are kept."""
    return f"imported/{model.replace(':', '/').strip('/').replace('//', '/')}"


def model_of(store: Store, model: str) -> Manifest:
    """The model artifact of a ref, or of weights that were imported before. Raises UserError where it is another kind."""
    name = imported_ref(model) if is_outside(model) else model
    target = resolve_ref(store, name)
    found = find(store, target.kind, target.key)
    if found is None or found.kind != "model":
        what = f"a {target.kind}" if found else f"{target.kind} {target.key}, which is gone"
        raise UserError(
            f"{model} is no model but {what}; give a teacher's or a student's ref, or a timm name with its tag"
        )
    return found


def _model(store: Store, model: str, compute: ComputeConfig, do_stage: DoStage) -> Manifest:
    if not is_outside(model):
        return model_of(store, model)
    config = ImportConfig(pretrained=model)
    made = _do(store, STAGES["import"], config, {}, {SOURCE_ROLE: config.fingerprint()}, compute, do_stage)
    set_ref(store, imported_ref(model), made.kind, made.key)
    return made


def _data(
    store: Store, network: Manifest, model: str, data: str, compute: ComputeConfig, do_stage: DoStage
) -> Manifest:
    if not data:
        key = network.inputs.get("data")
        own = find(store, "dataset", key) if key else None
        if own is None:
            raise UserError(
                f"{model} was not trained on a data set of this store; give one with --data REF or --data FOLDER"
            )
        return own
    if not (Path(data).exists() or "://" in data):
        target = resolve_ref(store, data)
        found = find(store, target.kind, target.key)
        if found is None or found.kind != "dataset":
            raise UserError(
                f"--data {data} is no data set but of kind {target.kind}; give a ref such as digits/prepare, or a folder"
            )
        return found
    config = _testset(network, data)
    made = _do(store, STAGES["testset"], config, {}, {SOURCE_ROLE: config.fingerprint()}, compute, do_stage)
    set_ref(store, f"testsets/{made.key[:SHORT_KEY]}", made.kind, made.key)
    return made


def _testset(network: Manifest, data: str) -> TestsetConfig:
    """A folder, file or URL as a data set; files that only number their classes have the model's."""
    root, _, name = data.rstrip("/").rpartition("/")
    config = TestsetConfig(root=root or ("/" if data.startswith("/") else "."), labeled=name, test=name)
    if config.names():
        return config
    return config.model_copy(update={"class_names": tuple(network.metrics["class_names"])})


def _do(
    store: Store,
    stage: Stage,
    config: Config,
    inputs: dict[str, Manifest],
    sources: dict[str, str],
    compute: ComputeConfig,
    do_stage: DoStage,
) -> Manifest:
    keys = {**{role: manifest.key for role, manifest in inputs.items()}, **sources}
    key = artifact_key(stage.name, stage.version, config.key_fields(), keys)
    record = NodeRecord(
        name=stage.name,
        stage=stage.name,
        kind=stage.kind,
        key=key,
        version=stage.version,
        config=config.key_fields(),
        inputs=keys,
    )
    kinds = {role: manifest.kind for role, manifest in inputs.items()}
    request = StageRequest(
        store=store.url, record=record, stage=stage, config=config, input_kinds=kinds, compute=compute
    )
    return do_stage(request).manifest
