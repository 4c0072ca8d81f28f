"""Checkpoints of a training in the making: below the artifact's folder, under the attempt's id, named by content."""

from typing import Any

import torch

from storage.artifacts import FileEntry, attempts_folder
from storage.errors import DamagedObject, MissingObject
from storage.keys import file_sha256
from storage.objects import Store


def save_checkpoint(store: Store, key: str, attempt: str, step: int, state: dict[str, Any], kept: int = 2) -> str:
    """Write a checkpoint whole or not at all; keep this attempt's newest `kept`. Returns its path."""
    with store.staging() as folder:
        local = folder / "checkpoint.pt"
        torch.save(state, local)
        path = f"{_folder(key)}/{attempt}/step-{step:09d}-{file_sha256(local)}.pt"
        store.put_file(local, path)
    own = [p for p in list_checkpoints(store, key) if p.split("/")[-2] == attempt]
    store.delete(*own[kept:])
    return path


def list_checkpoints(store: Store, key: str) -> list[str]:
    """The checkpoints of all attempts at this model, the most advanced first."""
    paths = [path for path in store.paths(_folder(key)) if path.endswith(".pt")]
    return sorted(paths, key=lambda path: path.split("/")[-1], reverse=True)


def load_checkpoint(store: Store, path: str) -> dict[str, Any] | None:
    """The checkpoint, tensors and plain values only; None where its bytes do not match its name, or it is gone.

    (Another attempt at the same model may delete its own at any time.) Ranks of a node share one download.
    """
    size = store.sizes([path]).get(path)
    if size is None:
        return None
    entry = FileEntry(name=path, path=path, bytes=size, sha256=path.removesuffix(".pt").rsplit("-", 1)[1])
    try:
        with store.local_copy(entry) as local:
            state: dict[str, Any] = torch.load(local, weights_only=True, map_location="cpu")
    except (DamagedObject, MissingObject, FileNotFoundError):
        return None
    return state


def _folder(key: str) -> str:
    return attempts_folder("model", key)
