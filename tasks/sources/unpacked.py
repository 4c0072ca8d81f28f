"""torchvision's data sets as arrays on this machine's disk, so that its processes share one copy in memory.

torchvision loads a whole file in every process that asks for one image: 1.6 GB for SVHN's `extra`. So the first process
unpacks it into the node's cache folder (`unpacked/`, which the bound of that cache does not count), and all map it.
"""

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.cache import node_cache
from storage.errors import UserError
from storage.keys import digest

FORM = 1  # raised where what lies in a folder changes


@dataclass(frozen=True)
class Unpacked:
    """A part of a data set: pixels uint8 [n, height, width, 3], labels int64 [n], class names (empty: it has none)."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: list[str]


def unpacked(dataset: str, part: str, root: str, fingerprints: list[str]) -> Unpacked:
    """The part (`train`, `test`, `extra`) of torchvision's data set below `root`, mapped; unpacked where it was not yet.

    `fingerprints` of its files: others, another copy. Raises UserError where torchvision cannot read the files.
    """
    folder = node_cache().root / "unpacked" / digest([FORM, dataset, part, fingerprints])
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with folder.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process loads the file, the others wait for it
                if not folder.exists():
                    _unpack(_load(dataset, part, root), folder)
        pixels, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pixels", "labels"))
        return Unpacked(pixels, labels, json.loads((folder / "classes.json").read_text()))
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(f"data.root: torchvision cannot read {dataset} {part} in {root} ({error})") from error


def _load(dataset: str, part: str, root: str) -> Any:
    from torchvision import datasets  # loads torch

    which = {"split": part} if dataset == "SVHN" else {"train": part == "train"}
    return getattr(datasets, dataset)(root, **which)


def _unpack(data: Any, folder: Path) -> None:
    """Write the arrays beside their place and rename them, so that a kill leaves nothing that looks whole."""
    making = folder.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    is_svhn = hasattr(data, "labels")
    np.save(making / "pixels.npy", data.data.transpose(0, 2, 3, 1) if is_svhn else data.data)
    np.save(making / "labels.npy", np.asarray(data.labels if is_svhn else data.targets, np.int64))
    (making / "classes.json").write_text(json.dumps(list(getattr(data, "classes", []))))
    making.rename(folder)
