"""Labeling: an un-noised network over whole shards, one Parquet part a shard. For pseudo labels and for evaluation."""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.loader import IndexedImages, clean_batch, normalize
from models.predictions import PREDICTIONS_FILE, PROBABILITIES_FILE, predictions_table, probabilities_table
from models.worker import Stopped, Worker
from models.zoo import load_folder, materialize
from storage.artifacts import find_part, get, publish_part
from storage.errors import StoreError
from storage.objects import Store
from storage.shards import write_parquet


def label_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: predict the shards `spec["parts"]` (split, shard name, part key), publish a part for each.

    `spec`: store, stage, model (key), num_classes, source {kind, key}, parts, numerics, unique (only first copies of a
    selection's images). Batches are padded to a constant size and never cross shards, so a part's bytes depend on
    its shard, the network and the numerics alone. Raises StoreError on NaN or Inf, with the shard and key.
    """
    torch.set_num_threads(worker.threads)
    store, numerics = Store(spec["store"]), spec["numerics"]
    source = get(store, spec["source"]["kind"], spec["source"]["key"])
    names = {split for split, _, _ in spec["parts"]}
    splits = {split: IndexedImages(store, source, split, whole=None) for split in names}
    model, view = load_model(store, spec["model"], numerics)
    rows = {(split, name): splits[split].rows_of(name, spec["unique"]) for split, name, _ in spec["parts"]}
    done, total = 0, sum(len(found) for found in rows.values())
    for split, name, part_key in spec["parts"]:
        if worker.stop_requested:
            raise Stopped
        own = rows[split, name]
        if find_part(store, spec["stage"], part_key, numerics) is None:
            probabilities, images = [], splits[split].in_order(own)
            for start in range(0, len(own), numerics["batch"]):
                batch = own[start : start + numerics["batch"]]
                clean = clean_batch(islice(images, len(batch)), view["size"], view["crop_pct"])
                probabilities.append(_predict(model, splits[split], batch, clean, view, numerics))
                worker.progress(done + start + len(batch), total)
            _publish(store, spec, part_key, splits[split], own, probabilities)
        done += len(own)
    worker.progress(total, total, last=True)
    return {}


def load_model(store: Store, key: str, numerics: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model artifact, ready to predict, and its input: size, crop share, mean and std."""
    with tempfile.TemporaryDirectory(prefix="nst-model-") as folder:
        materialize(store, get(store, "model", key), Path(folder))
        model = load_folder(Path(folder))
    input_config: Any = model.pretrained_cfg
    model = model.to(numerics["device"])
    if numerics["layout"] == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    view = {
        "size": input_config["input_size"][-1],
        "crop_pct": input_config["crop_pct"],
        "mean": input_config["mean"],
        "std": input_config["std"],
    }
    return model, view


@torch.inference_mode()
def _predict(
    model: nn.Module,
    images: IndexedImages,
    rows: Any,
    clean: torch.Tensor,
    view: dict[str, Any],
    numerics: dict[str, Any],
) -> np.ndarray:
    """Probabilities of some rows with these views, float32 [rows, classes]; the batch is padded with its first image."""
    padding = numerics["batch"] - len(clean)
    if padding:
        clean = torch.cat([clean, clean[:1].expand(padding, -1, -1, -1)])
    probabilities = forward_probabilities(model, clean, view, numerics)[: len(rows)]
    bad = ~np.isfinite(probabilities).all(axis=1)
    if bad.any():
        row = rows[int(np.flatnonzero(bad)[0])]
        raise StoreError(
            f"the network's output for image {images.index['key'][row].as_py()} of shard {images.shard_path(row)} is not "
            "finite; retrain the model with a lower learning rate"
        )
    return probabilities


@torch.inference_mode()
def forward_probabilities(
    model: nn.Module, images: torch.Tensor, view: dict[str, Any], numerics: dict[str, Any]
) -> np.ndarray:
    """uint8 [n, size, size, 3] -> softmax probabilities float32 [n, classes]."""
    inputs = normalize(images.to(numerics["device"]), view["mean"], view["std"])
    if numerics["layout"] != "channels_last":
        inputs = inputs.contiguous()
    mixed = numerics["dtype"] == "bfloat16"
    with torch.autocast(numerics["device"], dtype=torch.bfloat16, enabled=mixed):
        logits = model(inputs)
    return logits.float().softmax(dim=-1).cpu().numpy()


def _publish(
    store: Store, spec: dict[str, Any], part_key: str, images: IndexedImages, rows: Any, probabilities: list[np.ndarray]
) -> None:
    key_column = "source_key" if spec["unique"] else "key"
    keys = images.index[key_column].take(list(rows)).to_pylist()
    values = np.concatenate(probabilities) if probabilities else np.zeros((0, spec["num_classes"]), np.float32)
    with store.staging() as folder:
        write_parquet(folder / PREDICTIONS_FILE, predictions_table(keys, values))
        write_parquet(folder / PROBABILITIES_FILE, probabilities_table(values))
        files = {name: (folder / name, len(keys)) for name in (PREDICTIONS_FILE, PROBABILITIES_FILE)}
        publish_part(store, spec["stage"], part_key, spec["numerics"], files)
