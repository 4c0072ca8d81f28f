"""Predictions of altered images for an evaluator: which pieces there are, making those that are missing, reading them.

A piece is one alteration (a corruption at a severity, an epsilon) of one shard, or of one stretch of an archive. Its key is made from the
model, the alteration and the images, so a rerun with another severity, or a data set that grew, makes only what is new.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from models.compute import group_shards, num_cores, num_gpus
from models.numerics import chosen_numerics, part_numerics
from storage.artifacts import FileEntry, Manifest, Part, find_parts, made_parts
from storage.errors import UserError
from storage.keys import digest
from storage.objects import Store
from storage.shards import index_name, read_tables, shard_files
from tasks.agreement import agree
from tasks.contract import StageContext

VERSION = 1  # of the pieces: what a worker makes of the same images, alteration and model
PARTS = "robustness"  # models/robustness.py
LABELED_IS_WORTH = 4  # as in tasks/label.py: images that are only read


@dataclass(frozen=True)
class ImageSet:
    """Images that are read in one pass: their name and number, what tells them from others, how a worker finds them."""

    name: str
    count: int
    identity: Any
    spec: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A piece: some images in one alteration. Pieces with the same `group` and images are made together."""

    images: ImageSet
    variant: dict[str, Any]
    name: str
    group: str = ""


@dataclass(frozen=True)
class Alteration:
    """What is done to every image of an evaluation; see models/robustness.py.

    `stored`: images are seen whole, not cropped; `restrict`: the only classes that may be predicted (None: all); `exact`: the
    network runs in eager float32 whatever `compute` says.
    """

    settings: dict[str, Any]
    stored: bool = False
    restrict: tuple[int, ...] | None = None
    exact: bool = False


@dataclass
class Predicted:
    """The pieces, in the order in which they were asked for; the artifact's files; how they were computed."""

    parts: list[Part]
    files: tuple[FileEntry, ...]
    numerics: dict[str, Any] = field(default_factory=dict)

    def tables(self, context: StageContext) -> list[pa.Table]:
        """The rows of each piece (models/robustness.py:predictions_schema)."""
        return read_tables(context.store, [part.files[0] for part in self.parts])


def shard_sets(model: Manifest, data: Manifest, split: str) -> list[ImageSet]:
    """The shards of a split of a data set. Raises UserError where its classes are not among the model's."""
    if not data.files_under(f"shards/{split}/"):
        there = sorted({entry.name.split("/")[1] for entry in data.files_under("shards/")})
        raise UserError(
            f"data set {data.key[:12]} has no {split} images, it has {', '.join(there)}; set split to one of these"
        )
    classes = classes_of(model, data.metrics["class_names"], f"data set {data.key[:12]}")
    shards = shard_files(data, split)
    indices = data.files_named(index_name(shard) for shard in shards)
    source = {"kind": data.kind, "key": data.key}
    return [
        ImageSet(
            name=shard.name,
            count=shard.rows or 0,
            identity=[shard.sha256, index.sha256, classes],
            spec={"source": source, "split": split, "shard": shard.name, "classes": classes},
        )
        for shard, index in zip(shards, indices, strict=True)
    ]


def classes_of(model: Manifest, names: Sequence[str], what: str) -> list[int]:
    """The model's number of each of some classes, by name. Raises UserError where the model does not know one.

    A model whose classes have no names (weights from outside) takes as many classes as it has by their number.
    """
    own = model.metrics["class_names"]
    if model.metrics.get("classes_by_number") and len(own) == len(names):
        return list(range(len(names)))
    number = {name: place for place, name in enumerate(own)}
    unknown = [name for name in names if name not in number]
    if unknown:
        raise UserError(
            f"{what} has classes that model {model.key[:12]} does not know, {len(unknown)} of {len(names)} (the first: "
            f"{unknown[0]!r}; the model's first: {own[0]!r}); choose data of the model's {len(own)} classes, or rename its "
            "classes as the model's are named"
        )
    return [number[name] for name in names]


def image_size_of(store: Store, model: Manifest) -> int:
    """The side of the images that a model takes, in pixels."""
    with store.local_copy(model.file("config.json")) as path:
        return int(json.loads(path.read_text())["pretrained_cfg"]["input_size"][-1])


def ranked_classes(table: pa.Table) -> np.ndarray:
    """The likeliest classes of predicted rows, int [rows, up to 5], the first first."""
    column = table["top_classes"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(table), column.type.list_size)


def first_classes(table: pa.Table) -> np.ndarray:
    """The predicted class of each row, int [rows]."""
    return ranked_classes(table)[:, 0]


def predict_altered(
    context: StageContext, stage: str, model: Manifest, alteration: Alteration, asked: Sequence[Asked]
) -> Predicted:
    """Make the missing pieces, several groups at a time, and return all of them."""
    keys = [_part_key(model, alteration, piece) for piece in asked]
    chosen = chosen_numerics(context.compute)
    if alteration.exact:
        chosen |= {"dtype": "float32", "compile": False}
    agreed = agree(context, "evaluation", PARTS, keys, stage, lambda: chosen)
    numerics = part_numerics(agreed)
    found = find_parts(context.store, PARTS, keys, numerics)
    missing = [(key, piece) for key, piece in zip(keys, asked, strict=True) if found[key] is None]
    if missing:
        _make(context, model, alteration, missing, numerics)
        found = find_parts(context.store, PARTS, keys, numerics)
    parts = made_parts(PARTS, found, keys)
    files = tuple(
        part.files[0].model_copy(update={"name": f"predictions/{piece.name}.parquet"})
        for part, piece in zip(parts, asked, strict=True)
    )
    return Predicted(parts, files, agreed)


def _make(
    context: StageContext,
    model: Manifest,
    alteration: Alteration,
    missing: Sequence[tuple[str, Asked]],
    numerics: dict[str, Any],
) -> None:
    grouped: dict[tuple[str, str], list[tuple[str, Asked]]] = {}
    for key, piece in missing:
        grouped.setdefault((piece.group, piece.images.name), []).append((key, piece))
    jobs: list[dict[str, Any]] = [
        {
            "name": f"{group} {name}".strip(),
            "count": pieces[0][1].images.count,
            "images": pieces[0][1].images.spec,
            "parts": [(key, piece.variant) for key, piece in pieces],
        }
        for (group, name), pieces in grouped.items()
    ]
    compute, processes, gpus = context.compute, context.engine.processes, num_gpus()
    on_gpu = numerics["device"] == "cuda"
    if on_gpu:
        processes = compute.processes or max(1, gpus)
    sizes = [job["count"] * len(job["parts"]) for job in jobs]
    most = len(jobs) if on_gpu or numerics["compile"] else None
    groups = group_shards(sizes, processes, compute, most, worth=max(1, compute.task_images // LABELED_IS_WORTH))
    specs = [
        {
            "store": context.store.url,
            "model": model.key,
            "numerics": numerics,
            "alteration": alteration.settings,
            "stored": alteration.stored,
            "restrict": alteration.restrict,
            "jobs": [jobs[place] for place in group],
            "gpu": number % max(1, gpus),
            "decoders": max(1, num_cores() // processes) if on_gpu else 0,
        }
        for number, group in enumerate(groups)
    ]
    context.engine.map("models.robustness:predict_altered", specs, context.progress_of(sum(sizes)))


def _part_key(model: Manifest, alteration: Alteration, piece: Asked) -> str:
    return digest(
        {
            "version": VERSION,
            "model": model.key,
            "alteration": alteration.settings,
            "stored": alteration.stored,
            "restrict": alteration.restrict,
            "variant": piece.variant,
            "images": piece.images.identity,
        }
    )
