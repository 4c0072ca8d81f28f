"""A network from outside (timm's, the hub's, a folder's) as a model artifact, to be evaluated like one that was trained here."""

import shutil
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from torch import nn

from models.pretrained import CONFIG_FILE, WEIGHTS_FILE, Pretrained, locate
from models.worker import Worker
from models.zoo import load_folder
from storage.artifacts import artifact_folder, publish_file
from storage.errors import UserError
from storage.objects import Store

IMAGENET_CLASSES = 1000


def import_model(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: `spec` has store, key, pretrained. Returns the artifact's files and metrics.

    The files are copied as they are. Raises UserError where timm cannot build the network from them.
    """
    store, found = Store(spec["store"]), locate(spec["pretrained"])
    folder = artifact_folder("model", spec["key"])
    with store.staging() as staging:
        _copy(found, staging)
        model = _load(staging, found.source)
        names, by_number = class_names(found)
        files = [publish_file(store, folder, name, staging / name) for name in (WEIGHTS_FILE, CONFIG_FILE)]
    metrics = {
        "class_names": names,
        "classes_by_number": by_number,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pretrained": found.source,
    }
    return {"files": [entry.model_dump() for entry in files], "metrics": metrics}


def class_names(found: Pretrained) -> tuple[list[str], bool]:
    """The names of its classes, and whether they are only a guess, so that data may number them instead.

    timm's networks of 1,000 classes name none: they have ImageNet's, WordNet ids in their order (`n01440764` ...).
    """
    named = found.config.get("label_names")
    if named:
        return [str(name) for name in named], False
    if found.num_classes == IMAGENET_CLASSES:
        return ImageNetInfo("imagenet-1k").label_names(), True
    return [str(number) for number in range(found.num_classes)], True


def _copy(found: Pretrained, folder: Path) -> None:
    shutil.copyfile(found.weights, folder / WEIGHTS_FILE)
    shutil.copyfile(found.weights.parent / CONFIG_FILE, folder / CONFIG_FILE)


def _load(folder: Path, source: str) -> nn.Module:
    try:
        return load_folder(folder)
    except Exception as error:  # timm, torch and safetensors fail in many ways
        raise UserError(f"{source}: timm cannot build this network from its files ({error}); update timm?") from error
