"""train: a teacher on the labeled images, or a student on labeled and pseudo-labeled images."""

from models.configs import TrainConfig
from models.numerics import chosen_numerics
from storage.artifacts import FileEntry, Manifest, agree_numerics
from storage.errors import UserError
from tasks.contract import StageContext, StageResult

VERSION = 1


def train(context: StageContext, config: TrainConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Train a network; `inputs`: data, and for a student selection and (order=once) labels.

    Raises UserError where a batch is larger than the data, or ranks do not divide the replicas.
    """
    data, selection, labels = inputs["data"], inputs.get("selection"), inputs.get("labels")
    check_batches(config, "train", data, selection)
    ranks = context.compute.ranks
    if config.replicas % ranks:
        raise UserError(
            f"compute.ranks={ranks} does not divide train.replicas={config.replicas}; choose a divisor of it"
        )
    spec = {
        "store": context.store.url,
        "key": context.key,
        "attempt": context.attempt,
        "config": config.model_dump(mode="json"),
        "dataset": data.key,
        "selection": selection.key if selection else "",
        "labels": labels.key if labels else "",
        "class_names": data.metrics["class_names"],
        "numerics": agree_numerics(
            context.store, "model", context.key, {**chosen_numerics(context.compute), "compile": False}
        ),
        "loader_workers": context.compute.loader_workers,
        "checkpoint_steps": context.compute.checkpoint_steps,
    }
    result = context.engine.gang("models.training:train", spec, ranks, context.on_progress)
    files = tuple(FileEntry.model_validate(entry) for entry in result["files"])
    return StageResult(files, result["metrics"], {**result["facts"], "ranks": ranks, "numerics": spec["numerics"]})


def check_batches(config: TrainConfig, field: str, data: Manifest, selection: Manifest | None = None) -> None:
    """Raise UserError where a batch of `config` holds more images than there are."""
    num_labeled = data.metrics["labeled"]["images"]
    if config.labeled_batch > num_labeled:
        raise UserError(
            f"{field}.labeled_batch={config.labeled_batch} is larger than the labeled set of {num_labeled} images; "
            f"set {field}.labeled_batch to {num_labeled} or less"
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
