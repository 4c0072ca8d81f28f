"""train: a teacher on the labeled images, a student on labeled and pseudo-labeled ones, or the fine-tuning of either."""

from typing import Any

from models.compute import ComputeConfig
from models.configs import TrainConfig
from models.numerics import resolve_device, training_choices
from models.trackers import check_installed
from storage.artifacts import FileEntry, Manifest, agree_numerics, agreed_numerics, attempts_folder
from storage.cache import node_cache
from storage.errors import UserError
from tasks.contract import StageContext, StageResult

VERSION = 2
TEACHER_ROLE, INITIAL_ROLE = "teacher", "initial"  # of the inputs: who labels online, whose weights come first


def train(context: StageContext, config: TrainConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Train a network; `inputs`: data; for a student selection, at will labels (order=once) or teacher (online); and
    initial, whose weights it starts from.

    Raises UserError where a batch is larger than the data, ranks do not divide the replicas, or a setting needs what
    this machine does not have.
    """
    data, selection = inputs["data"], inputs.get("selection")
    check_batches(config, "train", data, selection)
    check_compute(config, "train", context.compute)
    keys = {
        role: inputs[role].key if role in inputs else "" for role in ("selection", "labels", TEACHER_ROLE, INITIAL_ROLE)
    }
    spec = {
        "store": context.store.url,
        "key": context.key,
        "attempt": context.attempt,
        "name": context.name or context.key,
        "config": config.model_dump(mode="json"),
        "dataset": data.key,
        **keys,
        "source": context.source,
        "class_names": data.metrics["class_names"],
        "device": resolve_device(context.compute),
        "numerics": _numerics(context),
        "compute": context.compute.model_dump(mode="json"),
        "log_folder": _log_folder(context),
    }
    ranks = context.compute.ranks
    result = context.engine.gang("models.training:train", spec, ranks, context.on_progress)
    files = tuple(FileEntry.model_validate(entry) for entry in result["files"])
    return StageResult(files, result["metrics"], {**result["facts"], "ranks": ranks})


def check_compute(config: TrainConfig, field: str, compute: ComputeConfig) -> None:
    """Raise UserError where this machine, or the way it is used, cannot train the network as `config` says."""
    if config.replicas % compute.ranks:
        raise UserError(
            f"compute.ranks={compute.ranks} does not divide {field}.replicas={config.replicas}; choose a divisor of it"
        )
    check_installed(compute.trackers)
    if config.batch_norm == "synchronized":
        if resolve_device(compute) != "cuda":
            raise UserError(
                f"{field}.batch_norm=synchronized needs GPUs (torch.nn.SyncBatchNorm refuses CPUs); set it to replica"
            )
        if config.replicas != compute.ranks:
            raise UserError(
                f"{field}.batch_norm=synchronized needs one replica a rank, here {config.replicas} replicas on "
                f"{compute.ranks} ranks; set {field}.replicas={compute.ranks}"
            )


def _numerics(context: StageContext) -> dict[str, Any] | None:
    """What an earlier attempt or the config settled; None where it is to be measured before the first step.

    An attempt without a checkpoint binds nobody who asks for other numerics. Raises UserError where one with a checkpoint
    does: the training would go on with other bits than it began.
    """
    store, key = context.store, context.key
    agreed, choices = (
        agreed_numerics(store, "model", key),
        training_choices(context.compute, bfloat16=True, compiler=True),
    )
    if agreed is None:
        return agree_numerics(store, "model", key, choices[0]) if len(choices) == 1 else None
    fields = ("device", "dtype", "layout", "compile")
    if any(all(choice[field] == agreed[field] for field in fields) for choice in choices):
        return agreed
    if any(path.endswith(".pt") for path in store.paths(attempts_folder("model", key))):
        began = ", ".join(f"{field} {agreed[field]}" for field in fields)
        raise UserError(
            f"{context.name or key}: this training began with {began}, which this machine or compute.train_* rules out; "
            f"go on where that is possible, or start it anew with --rerun {context.name or 'STAGE'}"
        )
    return agree_numerics(store, "model", key, choices[0], instead_of=agreed)


def _log_folder(context: StageContext) -> str:
    """Where this training's event files go."""
    root = context.compute.log_folder or str((context.store.root or node_cache().root) / "logs")
    return f"{root}/{context.name.replace('/', '-') or 'train'}-{context.key[:12]}"


def check_batches(config: TrainConfig, field: str, data: Manifest, selection: Manifest | None = None) -> None:
    """Raise UserError where a batch of `config` holds more images than there are."""
    num_labeled = data.metrics["labeled"]["images"]
    if config.labeled_batch > num_labeled:
        raise UserError(
            f"{field}.labeled_batch={config.labeled_batch} is larger than the labeled set of {num_labeled} images; "
            f"set it to {num_labeled} or less, for all networks with train.labeled_batch={num_labeled}"
        )
    if selection is not None:
        check_unlabeled_batch(config, field, selection.metrics["total"], "the selection holds")


def check_unlabeled_batch(config: TrainConfig, field: str, num_unlabeled: int, what: str) -> None:
    """Raise UserError where a batch holds more unlabeled images than a selection has (`what` says how that is known)."""
    wanted = config.replicas * config.replica_unlabeled
    if wanted > num_unlabeled:
        raise UserError(
            f"{field}.batch_ratio={config.batch_ratio} asks for {wanted} unlabeled images a batch, {what} {num_unlabeled}; "
            "lower the ratio or raise select.images_per_class"
        )
