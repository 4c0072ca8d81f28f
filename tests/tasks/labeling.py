"""The label stage on small artifacts, in this process: for tests of what is computed, not where."""

from typing import Any

import numpy as np
import torch

from models import zoo
from models.compute import ComputeConfig, LocalEngine
from models.configs import LabelConfig, ModelConfig, NoiseConfig, TrainConfig
from models.predictions import read_predictions, read_probabilities
from storage.artifacts import Manifest, artifact_folder, commit, publish_file
from storage.keys import digest
from storage.objects import Store
from tasks.contract import StageContext, StageResult
from tasks.label import label
from tests.models.artifacts import CLASSES, Artifacts, commit_result

NETWORK = ModelConfig(
    name="resnet18",
    args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    image_size=24,
    crop_pct=0.875,
    dropout=0.3,
    drop_path=0.2,
)
TRAINED = TrainConfig(model=NETWORK, epochs=1, labeled_batch=8, noise=NoiseConfig(crop="pad", num_ops=1))
BATCH = 16
PLAIN: dict[str, Any] = {"dtype": "float32", "compile": "never", "inference_batch": BATCH}


def teacher(store: Store, seed: int) -> Manifest:
    """A network with random weights, sharpened, as the train stage would have committed it."""
    torch.manual_seed(seed)
    model = zoo.build(NETWORK, len(CLASSES), bn_momentum=0.5).train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 24, 24))
        model.get_classifier().weight.mul_(5)
    key = digest(["teacher", seed])
    with store.staging() as folder:
        zoo.save(model, NETWORK, list(CLASSES), folder)
        names = (zoo.WEIGHTS_FILE, zoo.CONFIG_FILE)
        files = tuple(publish_file(store, artifact_folder("model", key), name, folder / name) for name in names)
    facts: dict[str, Any] = {"stage": "train", "stage_version": 1, "config": TRAINED.key_fields(), "inputs": {}}
    return commit(store, Manifest(kind="model", key=key, files=files, metrics={"class_names": list(CLASSES)}, **facts))


class InThisProcess(LocalEngine):
    """Runs the pieces of work here: these tests are about what is computed, not where."""

    def map(self, function: str, specs: Any, on_progress: Any) -> list[dict[str, Any]]:
        from models import inference
        from models.worker import Worker

        return [getattr(inference, function.partition(":")[2])(spec, Worker()) for spec in specs]


class Labeled:
    """What the label stage made: class, confidence, probabilities of the unlabeled images in order."""

    def __init__(self, artifacts: Artifacts, models: list[Manifest], compute: dict[str, Any] = PLAIN, **config: Any):
        settings = ComputeConfig(processes=1, **compute)
        own = LabelConfig(**config)
        key = digest([own.model_dump(mode="json"), [model.key for model in models], compute])
        context = StageContext(artifacts.store, key, InThisProcess(settings), settings)
        roles = {f"model.{n}" if n > 1 else "model": model for n, model in enumerate(models, 1)}
        result = label(context, own, {"data": artifacts.data, **roles})
        manifest = commit_result(artifacts.store, "labels", key, result, {})
        table = read_predictions(artifacts.store, manifest)
        self.label, self.confidence = table["label"].to_numpy(), table["confidence"].to_numpy()
        parts = manifest.files_under("probabilities/")
        found = [read_probabilities(artifacts.store, manifest, entry) for entry in parts]
        self.probabilities = np.concatenate(found).astype(np.float64)
        self.result: StageResult = result
