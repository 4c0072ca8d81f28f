"""label: the un-noised weight average of a model predicts every image of a data set, two Parquet files a shard."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.compute import group_shards, num_cores, num_gpus
from models.configs import LabelConfig
from models.numerics import chosen_numerics, labeling_choices, labeling_seconds, part_numerics
from models.predictions import TOP_K_CLASSES
from storage.artifacts import FileEntry, Manifest, Part, find_parts, made_parts
from storage.errors import UserError
from storage.keys import digest
from storage.objects import Store
from storage.shards import index_name, read_table, shard_files
from tasks.agreement import agree
from tasks.contract import StageContext, StageResult

LABELED_IS_WORTH = 4  # images that are only read or copied: it takes a core longer than they do
VERSION = 3  # 3: dtype and compile are chosen for the whole job
PREDICT = "predict"  # parts of labels and evaluations are the same thing, so they share a name
CONFIDENCE_BINS = 20


def label(context: StageContext, config: LabelConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Label the unlabeled images of `inputs["data"]`, or the unique images of `inputs["selection"]`.

    By `inputs["model"]`; where `model.2`, `model.3` and so on are given too, by the mean of all their probabilities.
    """
    selection = inputs.get("selection")
    source, split = (selection, "train") if selection else (inputs["data"], "unlabeled")
    models = [inputs[role] for role in model_roles(inputs)]
    predicted = Predictions(context, "labels", models, source, config, unique=selection is not None)
    files = predicted.of([split])[split]
    predictions = [entry for entry in files if entry.name.startswith("predictions/")]
    metrics = _summary(context.store, predictions, models[0].metrics["class_names"])
    return StageResult(files, metrics, {"numerics": predicted.numerics})


def model_roles(inputs: Iterable[str]) -> list[str]:
    """Of the roles of a label stage's inputs those of its teachers, the first first: `model`, `model.2`, `model.3`."""
    return sorted((role for role in inputs if role.partition(".")[0] == "model"), key=_number)


def predict(
    context: StageContext, model: Manifest, source: Manifest, splits: Sequence[str], kind: str
) -> dict[str, tuple[FileEntry, ...]]:
    """Predictions of one model by split, for an evaluation: in float32 unless `compute` says otherwise.

    The data's classes may be some of the model's, in another order: the caller knows which is which.
    """
    return Predictions(context, kind, [model], source, LabelConfig(), exact=True).of(splits)


class Predictions:
    """The predictions that an artifact of `kind` needs: parts that exist already are kept, the others are made."""

    def __init__(
        self,
        context: StageContext,
        kind: str,
        models: Sequence[Manifest],
        source: Manifest,
        config: LabelConfig,
        unique: bool = False,
        exact: bool = False,
    ) -> None:
        """`unique`: only first copies of a selection's images; `exact`: for an evaluation: what `compute` leaves open is
        float32, eager, and whose classes these are is the caller's concern.

        Raises UserError where a model has other classes than the data, or the config does not fit them.
        """
        for model in models:
            if not exact:
                check_classes(model, source)
            _check_config(config, model)
        self._context, self._kind, self._models, self._source = context, kind, models, source
        self._config, self._unique, self._exact = config, unique, exact
        self.numerics: dict[str, Any] = {}  # once `of` was called: those of the artifact

    def of(self, splits: Sequence[str]) -> dict[str, tuple[FileEntry, ...]]:
        """The files by split: of each shard, in their order, its predictions and its probabilities."""
        store = self._context.store
        shards = [(split, shard) for split in splits for shard in shard_files(self._source, split)]
        indices = self._source.files_named(index_name(shard) for _, shard in shards)
        keys = {shard.name: self._part_key(shard, index) for (_, shard), index in zip(shards, indices, strict=True)}
        stage = {"labels": "label", "evaluation": "evaluate"}[self._kind]
        choose = partial(self._cheapest, [shard for _, shard in shards])
        self.numerics = agree(self._context, self._kind, PREDICT, list(keys.values()), stage, choose)
        numerics = part_numerics(self.numerics)
        found = find_parts(store, PREDICT, list(keys.values()), numerics)
        missing = [(split, shard) for split, shard in shards if found[keys[shard.name]] is None]
        if missing:
            self._make(missing, keys, numerics)
            found = find_parts(store, PREDICT, list(keys.values()), numerics)
        own = {split: [keys[shard.name] for of, shard in shards if of == split] for split in splits}
        return {split: _named(split, made_parts(PREDICT, found, own[split])) for split in splits}

    def _make(self, missing: list[tuple[str, FileEntry]], keys: dict[str, str], numerics: dict[str, Any]) -> None:
        context, compute = self._context, self._context.compute
        sizes = [shard.rows or 0 for _, shard in missing]
        processes, gpus = context.engine.processes, num_gpus()
        on_gpu = numerics["device"] == "cuda"
        if on_gpu and compute.engine == "local":  # a cluster's engine counts the cluster's GPUs
            processes = compute.processes or max(1, gpus)
        # a process that compiles, or holds a GPU, is paid once: all its shards are one task, committed one by one
        most = len(missing) if on_gpu or numerics["compile"] else None
        groups = group_shards(sizes, processes, compute, most, worth=max(1, compute.task_images // LABELED_IS_WORTH))
        specs = [
            {
                "store": context.store.url,
                "stage": PREDICT,
                "models": [model.key for model in self._models],
                "source": {"kind": self._source.kind, "key": self._source.key},
                "parts": [(missing[i][0], missing[i][1].name, keys[missing[i][1].name]) for i in group],
                "numerics": numerics,
                "label": self._config.model_dump(mode="json"),
                "unique": self._unique,
                "gpu": number % max(1, gpus),
                "decoders": max(1, num_cores() // processes) if on_gpu else 0,
            }
            for number, group in enumerate(groups)
        ]
        context.engine.map("models.inference:label_shards", specs, context.progress_of(sum(sizes)))

    def _part_key(self, shard: FileEntry, index: FileEntry) -> str:
        """(version, models, config, content of the shard and of its index): a growing data set labels only its new shards.

        The index counts because it decides which images of the tar are there: leaked ones are left out of it.
        """
        identity: dict[str, Any] = {
            "version": VERSION,
            "models": [model.key for model in self._models],
            "config": self._config.key_fields(),
            "shard": shard.sha256,
            "index": index.sha256,
        }
        return digest({**identity, "unique": True} if self._unique else identity)

    def _cheapest(self, shards: Sequence[FileEntry]) -> dict[str, Any]:
        """The cheapest numerics for all the images, whoever labels them and whatever is there already.

        So one artifact is computed in one way on machines of a kind, however many processes there are.
        """
        context, compute = self._context, self._context.compute
        if self._exact or "auto" not in (compute.dtype, compute.compile):
            return chosen_numerics(compute)
        spec = {"store": context.store.url, "models": [model.key for model in self._models]}
        spec["device"] = chosen_numerics(compute)["device"]
        (survey,) = context.engine.map("models.inference:survey", [spec], lambda progress: None)
        choices = labeling_choices(compute, survey["bfloat16"], survey["compiler"])
        images, macs = sum(shard.rows or 0 for shard in shards), survey["macs"] * len(self._config.views)
        return min(choices, key=lambda choice: labeling_seconds(choice, images, macs))


def check_classes(model: Manifest, source: Manifest) -> None:
    """Raise UserError where a model was trained on other classes than those of the data."""
    own, wanted = model.metrics["class_names"], source.metrics["class_names"]
    if own != wanted:
        differ = (
            f"{len(own)} classes, the data {len(wanted)}"
            if len(own) != len(wanted)
            else "other class names than the data"
        )
        raise UserError(
            f"model {model.key[:12]} has {differ}; train a teacher on this data, or choose data of its classes"
        )


def _check_config(config: LabelConfig, model: Manifest) -> None:
    """Raise UserError where a setting does not fit the model."""
    num_classes = len(model.metrics["class_names"])
    if config.top_k > num_classes:
        raise UserError(
            f"label.top_k={config.top_k} is more than the {num_classes} classes; set it to {num_classes} or less, or to 0 "
            "to store all"
        )
    if (config.top_k or config.targets == "hard") and num_classes > TOP_K_CLASSES:
        raise UserError(
            f"label.top_k and label.targets=hard store classes as int16, up to {TOP_K_CLASSES:,}; the data has "
            f"{num_classes:,}. Set label.top_k=0 and label.targets=soft"
        )
    if config.noised and "model" not in model.config:
        raise UserError(
            f"label.noised=true needs the noise of the teacher's training, and model {model.key[:12]} does not say with "
            "which it was trained; set label.noised=false"
        )


def _named(split: str, parts: Sequence[Part]) -> tuple[FileEntry, ...]:
    return tuple(
        entry.model_copy(update={"name": f"{Path(entry.name).stem}/{split}/{number:05d}.parquet"})
        for number, part in enumerate(parts)
        for entry in part.files
    )


def _number(role: str) -> int:
    """The place of a teacher's role among them: `model`, `model.2`, `model.3`."""
    number = role.partition(".")[2]
    return int(number) if number.isdigit() else 1


def _summary(store: Store, files: Sequence[FileEntry], class_names: list[str]) -> dict[str, Any]:
    """The metrics of labels, one file after the other."""
    images, total = 0, 0.0
    histogram, per_class = np.zeros(CONFIDENCE_BINS, np.int64), np.zeros(len(class_names), np.int64)
    for entry in files:
        table = read_table(store, entry, ["confidence", "label"])
        confidence = table["confidence"].to_numpy()
        images, total = images + len(table), total + float(confidence.sum(dtype=np.float64))
        histogram += np.histogram(confidence, bins=CONFIDENCE_BINS, range=(0.0, 1.0))[0]
        per_class += np.bincount(table["label"].to_numpy(), minlength=len(class_names))
    return {
        "images": images,
        "mean_confidence": total / images if images else 0.0,
        "confidence_histogram": histogram.tolist(),
        "per_class": per_class.tolist(),
        "class_names": class_names,
    }
