"""What the tests of training share: a tiny student that has all noise on, runs of it in this process, and what came out."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy

from models.configs import TrainConfig
from models.training import train
from models.worker import Worker
from storage.artifacts import FileEntry, Manifest
from storage.keys import digest
from tasks.contract import StageResult
from tests.models.artifacts import CLASSES, Artifacts, commit_result, file_of, training_spec

STEPS = 18
CONFIG = TrainConfig.model_validate(
    {
        "model": {
            "name": "resnet18",
            "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
            "image_size": 16,
            "dropout": 0.2,
            "drop_path": 0.2,
        },
        "epochs": 3,
        "labeled_batch": 8,
        "batch_ratio": 2,
        "replicas": 2,
        "optimizer": {"lr_per_256": 0.5},
        "schedule": {"warmup_epochs": 1},
        "ema_decay": 0.9,
        "num_validations": 3,
        "noise": {"crop": "resized", "num_ops": 2, "magnitude": 9},
    }
)


def changed(config: TrainConfig = CONFIG, **fields: Any) -> TrainConfig:
    """The config with other fields, sections as plain values; checked anew."""
    raw = config.model_dump()
    for name, value in fields.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) and isinstance(raw[name], dict) else value
    return TrainConfig.model_validate(raw)


def spec(artifacts: Artifacts, name: str, config: TrainConfig = CONFIG, **more: Any) -> dict[str, Any]:
    """The spec of a training of its own key."""
    return training_spec(artifacts, config, digest(["training", name]), **more)


def run(artifacts: Artifacts, name: str, config: TrainConfig = CONFIG, **more: Any) -> dict[str, Any]:
    """Train in this process, undisturbed."""
    return train(spec(artifacts, name, config, **more), Worker())


def content(result: dict[str, Any]) -> dict[str, str]:
    """The sha256 of each published file by name: weights, config and history."""
    return {entry["name"]: entry["sha256"] for entry in result["files"]}


def weights(artifacts: Artifacts, result: dict[str, Any]) -> dict[str, np.ndarray]:
    """The published tensors by name."""
    entry = file_of(result, "model.safetensors")
    found: dict[str, np.ndarray] = safetensors.numpy.load_file(artifacts.store.local_path(entry.path))
    return found


def history(artifacts: Artifacts, result: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns of the history."""
    columns: dict[str, list[Any]] = pq.read_table(
        artifacts.store.local_path(file_of(result, "history.parquet").path)
    ).to_pydict()
    return columns


def commit_trained(artifacts: Artifacts, result: dict[str, Any], config: TrainConfig, name: str) -> Manifest:
    """The model artifact of what a training returned."""
    files = tuple(FileEntry.model_validate(entry) for entry in result["files"])
    made = StageResult(files, {**result["metrics"], "class_names": list(CLASSES)})
    key = digest(["training", name])
    return commit_result(artifacts.store, "model", key, made, {"data": artifacts.data.key}, config.key_fields())


class DisturbedWorker(Worker):
    """Is asked to stop, or fails, as soon as a number of steps is done."""

    def __init__(self, steps: int, error: Exception | None = None) -> None:
        super().__init__()
        self._steps, self._error = steps, error

    def progress(self, done: int, total: int, unit: str = "images", last: bool = False, **facts: Any) -> None:
        """Called after each step."""
        if done >= total * self._steps // STEPS:
            if self._error is not None:
                raise self._error
            self.stop_requested = True
