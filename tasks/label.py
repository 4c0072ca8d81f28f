"""label: the un-noised weight average of a model predicts every image of a data set, one Parquet part a shard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.compute import group_shards
from models.numerics import chosen_numerics, part_numerics
from storage.artifacts import FileEntry, Manifest, Part, agree_numerics, find_parts, made_parts
from storage.errors import UserError
from storage.keys import Config, digest
from storage.shards import index_name, read_tables, shard_files
from tasks.contract import StageContext, StageResult

VERSION = 2
PREDICT = "predict"  # parts of labels and evaluations are the same thing, so they share a name
CONFIDENCE_BINS = 20


class LabelConfig(Config):
    """Nothing to set yet: soft labels over all classes, one clean view."""


def label(context: StageContext, config: LabelConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Label the unlabeled images of `inputs["data"]`, or the unique images of `inputs["selection"]`."""
    selection = inputs.get("selection")
    source, split = (selection, "train") if selection else (inputs["data"], "unlabeled")
    files = predict(context, inputs["model"], source, [split], "labels", unique=selection is not None)[split]
    confidence, labels = _columns(context, [entry for entry in files if entry.name.startswith("predictions/")])
    counts, _ = np.histogram(confidence, bins=CONFIDENCE_BINS, range=(0.0, 1.0))
    num_classes = len(inputs["model"].metrics["class_names"])
    metrics = {
        "images": len(labels),
        "mean_confidence": float(confidence.mean(dtype=np.float64)),
        "confidence_histogram": [int(count) for count in counts],
        "per_class": [int(count) for count in np.bincount(labels, minlength=num_classes)],
        "class_names": inputs["model"].metrics["class_names"],
    }
    return StageResult(files, metrics, {"numerics": _numerics(context, "labels")})


def predict(
    context: StageContext, model: Manifest, source: Manifest, splits: Sequence[str], kind: str, unique: bool = False
) -> dict[str, tuple[FileEntry, ...]]:
    """Predictions by split, a Parquet part a shard; parts that exist already are kept.

    `kind` is the kind of artifact they are made for. Raises UserError where the model has other classes than the data.
    """
    check_classes(model, source)
    numerics = part_numerics(_numerics(context, kind))
    shards = [(split, shard) for split in splits for shard in shard_files(source, split)]
    keys = {shard.name: _part_key(model, source, shard, unique) for _, shard in shards}
    found = find_parts(context.store, PREDICT, list(keys.values()), numerics)
    missing = [(split, shard) for split, shard in shards if found[keys[shard.name]] is None]
    sizes = [shard.rows or 0 for _, shard in missing]
    specs = [
        {
            "store": context.store.url,
            "stage": PREDICT,
            "model": model.key,
            "num_classes": len(model.metrics["class_names"]),
            "source": {"kind": source.kind, "key": source.key},
            "parts": [(missing[i][0], missing[i][1].name, keys[missing[i][1].name]) for i in group],
            "numerics": numerics,
            "unique": unique,
        }
        for group in group_shards(sizes, context.engine.processes, context.compute)
    ]
    context.engine.map("models.inference:label_shards", specs, context.progress_of(sum(sizes)))
    if missing:
        found = find_parts(context.store, PREDICT, list(keys.values()), numerics)
    own = {split: [keys[shard.name] for of, shard in shards if of == split] for split in splits}
    return {split: _named(split, made_parts(PREDICT, found, own[split])) for split in splits}


def _named(split: str, parts: Sequence[Part]) -> tuple[FileEntry, ...]:
    """The files of a split's parts by their names in the artifact: both of the first shard, of the second and so on."""
    return tuple(
        entry.model_copy(update={"name": f"{Path(entry.name).stem}/{split}/{number:05d}.parquet"})
        for number, part in enumerate(parts)
        for entry in part.files
    )


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


def _part_key(model: Manifest, source: Manifest, shard: FileEntry, unique: bool) -> str:
    """(version, model, content of the shard and of its index): a growing data set labels only its new shards.

    The index counts because it decides which images of the tar are there: leaked ones are left out of it.
    """
    index = source.file(index_name(shard))
    identity: dict[str, Any] = {"version": VERSION, "model": model.key, "shard": shard.sha256, "index": index.sha256}
    return digest({**identity, "unique": True} if unique else identity)


def _numerics(context: StageContext, kind: str) -> dict[str, Any]:
    return agree_numerics(context.store, kind, context.key, chosen_numerics(context.compute))


def _columns(context: StageContext, files: Sequence[FileEntry]) -> tuple[np.ndarray, np.ndarray]:
    tables = read_tables(context.store, files, ["confidence", "label"])
    return tuple(np.concatenate([t[c].to_numpy() for t in tables]) for c in ("confidence", "label"))  # type: ignore[return-value]
