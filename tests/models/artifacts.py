"""Tiny real artifacts for the tests of training and inference: handwritten digits (scikit-learn), prepared and selected.

Labels are made by hand, so that no network has to be trained before a student can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.compute import ComputeConfig, LocalEngine
from models.predictions import predictions_table, probabilities_table
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file
from storage.keys import Config, digest
from storage.objects import Store
from storage.shards import index_name, read_table, shard_files, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.select import select
from tasks.selection.config import SelectConfig
from tests.datasets import prepare_all
from tests.real_images import encoded, write_images

CLASSES = ("zero", "one", "two", "three")
SPLITS = {"labeled": 48, "val": 24, "test": 8, "unlabeled": 72}
COMPUTE = ComputeConfig(processes=1)
NUMERICS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "layout": "channels_last",
    "compile": False,
    "batch": 16,
}


@dataclass(frozen=True)
class Artifacts:
    """A store with a data set, labels of its unlabeled images, and a selection from them."""

    store: Store
    data: Manifest
    labels: Manifest
    selection: Manifest


def make_artifacts(folder: Path) -> Artifacts:
    """48 labeled and 72 unlabeled digits of four classes in three shards each; 64 selected with duplicates."""
    store = Store(str(folder / "store"))
    write_digits(folder / "images")
    context = stage_context(store, "dataset")
    data = commit_result(
        store,
        "dataset",
        context.key,
        prepare_all(context, folder / "images", shard_images=24, leaks={"max_distance": 0}),
        {},
    )
    labels = label_by_hand(store, data)
    context = stage_context(store, "selection")
    chosen = SelectConfig(min_confidence=0.5, images_per_class=16, shard_images=24)
    selection = commit_result(
        store,
        "selection",
        context.key,
        select(context, chosen, {"data": data, "labels": labels}),
        {"data": data.key, "labels": labels.key},
    )
    return Artifacts(store, data, labels, selection)


def write_digits(folder: Path) -> None:
    """Parquet files of real 8 x 8 digits, each enlarged to 16 x 16."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    wanted = np.flatnonzero(targets < len(CLASSES))
    start = 0
    for split, count in SPLITS.items():
        rows = wanted[start : start + count]
        start += count
        pictures = [np.kron(pixels[row].reshape(8, 8), np.ones((2, 2))) * 15.9 for row in rows]
        images = [encoded(Image.fromarray(picture.astype(np.uint8))) for picture in pictures]
        own = None if split == "unlabeled" else [int(targets[row]) for row in rows]
        write_images(folder / f"{split}.parquet", images, own, CLASSES if own else None)


def label_by_hand(store: Store, data: Manifest, seed: int = 0, top_k: int = 0) -> Manifest:
    """Soft labels of the unlabeled split: every image another distribution, so that a mix-up shows."""
    rng, files = np.random.default_rng(seed), []
    key = digest(["labels", data.key, seed, top_k])
    for number, shard in enumerate(shard_files(data, "unlabeled")):
        keys = read_table(store, data.file(index_name(shard)), ["key"])["key"].to_pylist()
        probabilities = rng.dirichlet(np.full(len(CLASSES), 0.3), len(keys)).astype(np.float32)
        with store.staging() as folder:
            tables = {"predictions": predictions_table(keys, probabilities)}
            tables["probabilities"] = probabilities_table(probabilities, top_k)
            for kind, table in tables.items():
                write_parquet(folder / kind, table)
                name = f"{kind}/unlabeled/{number:05d}.parquet"
                files.append(publish_file(store, artifact_folder("labels", key), name, folder / kind, len(keys)))
    result = StageResult(tuple(files), {"class_names": list(CLASSES)})
    return commit_result(store, "labels", key, result, {"model": "by-hand", "data": data.key})


def commit_model(store: Store, model: Any, config: Any, name: str, class_names: Sequence[str] = CLASSES) -> Manifest:
    """A model artifact of this network."""
    from models import zoo

    key, files = digest(["model", name]), []
    with store.staging() as folder:
        zoo.save(model, config, list(class_names), folder)
        for file in (zoo.WEIGHTS_FILE, zoo.CONFIG_FILE):
            files.append(publish_file(store, artifact_folder("model", key), file, folder / file))
    return commit_result(store, "model", key, StageResult(tuple(files), {"class_names": list(class_names)}), {})


def stage_context(store: Store, name: str, compute: ComputeConfig = COMPUTE) -> StageContext:
    """The context of a stage of this store; its key is made from the name."""
    return StageContext(store, digest(name), LocalEngine(compute), compute)


def commit_result(
    store: Store, kind: str, key: str, result: StageResult, inputs: dict[str, str], config: dict[str, Any] | None = None
) -> Manifest:
    """Commit what a stage returned."""
    return commit(
        store,
        Manifest(
            kind=kind,
            key=key,
            stage=kind,
            stage_version=1,
            config=config or {},
            inputs=inputs,
            files=result.files,
            metrics=result.metrics,
        ),
    )


def training_spec(
    artifacts: Artifacts,
    config: Config,
    key: str,
    student: bool = True,
    compute: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The spec of `models.training:train`, as tasks/train.py makes it; `compute`: fields that differ."""
    settings = {"loader_workers": 0, "checkpoint_steps": 10_000, "trackers": [], **(compute or {})}
    return {
        "store": artifacts.store.url,
        "key": key,
        "attempt": "first",
        "config": config.model_dump(mode="json"),
        "dataset": artifacts.data.key,
        "selection": artifacts.selection.key if student else "",
        "labels": "",
        "teacher": "",
        "initial": "",
        "source": "",
        "name": "training",
        "class_names": list(CLASSES),
        "device": "cpu",
        "numerics": NUMERICS,
        "compute": ComputeConfig(**settings).model_dump(mode="json"),
        "log_folder": "",
        **more,
    }


def file_of(result: dict[str, Any], name: str) -> FileEntry:
    """The published file of that logical name in a training's result."""
    return next(FileEntry.model_validate(entry) for entry in result["files"] if entry["name"] == name)
