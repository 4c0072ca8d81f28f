"""Data sets that torchvision reads: CIFAR-10, CIFAR-100, SVHN (with `extra` as the unlabeled images).

Their files hold pixels, not encoded images; each becomes a PNG, which loses nothing. ImageNet's folders are class
folders: `source: files` with `labeled: train`.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from storage.errors import UserError
from storage.external import ExternalFile, ExternalFolder
from storage.keys import Config, digest
from tasks.sources import SPLITS, UNKNOWN_ROWS, RawImage, SourceFile, cut_rows
from tasks.sources.unpacked import Unpacked, unpacked

FILES = {
    "CIFAR10": {"train": [f"cifar-10-batches-py/data_batch_{n}" for n in range(1, 6)], "test": ["cifar-10-batches-py/test_batch"]},
    "CIFAR100": {"train": ["cifar-100-python/train"], "test": ["cifar-100-python/test"]},
    "SVHN": {"train": ["train_32x32.mat"], "test": ["test_32x32.mat"], "extra": ["extra_32x32.mat"]},
}  # fmt: skip
IMAGES = {
    "CIFAR10": {"train": 50_000, "test": 10_000},
    "CIFAR100": {"train": 50_000, "test": 10_000},
    "SVHN": {"train": 73_257, "test": 26_032, "extra": 531_131},
}


class TorchvisionConfig(Config):
    """Which data set, and how its training images are split."""

    dataset: Literal["CIFAR10", "CIFAR100", "SVHN"] = "CIFAR10"
    num_val: int = Field(4_000, ge=1, description="training images kept for validation (SVHN in the paper: 4,000)")
    num_labeled: int = Field(
        0, ge=0, description="training images that keep their labels, the others are unlabeled; 0: all"
    )
    seed: int = Field(0, ge=0)


class TorchvisionSource:
    """One virtual file a split. Needs the data set's files below `root`, as torchvision downloads them."""

    def __init__(self, config: TorchvisionConfig, root: str, limits: tuple[int, int]) -> None:
        self._config, self._root, self._limits = config, root, limits
        self._folder = ExternalFolder(root, "data.root")
        self._parts: dict[str, Unpacked] = {}
        if self._folder.root is None:
            raise UserError(f"data.source=torchvision reads files of this machine; data.root={root!r} is a bucket")
        left = IMAGES[config.dataset]["train"] - config.num_val
        if config.num_labeled > left:
            raise UserError(
                f"data.torchvision.num_labeled={config.num_labeled}: {left} training images are left for it"
            )

    def files(self, splits: Sequence[str]) -> list[SourceFile]:
        """One file a split. Raises UserError naming a file that is missing."""
        self._folder.check()
        found = []
        for split in splits:
            parts = sorted({part for part, _ in self._stretches(split)})
            fingerprints = [found for part in parts for found in self._fingerprints(part)]
            rows = sum(len(numbers) for _, numbers in self._stretches(split))
            if not rows:
                raise UserError(
                    f"data.torchvision: {self._config.dataset} has no unlabeled images of its own; set num_labeled below the "
                    "number of its training images"
                )
            settings = self._config.model_dump(mode="json")
            found.append(
                SourceFile(
                    split=split,
                    name=f"{self._config.dataset}-{split}",
                    bytes=0,
                    sha256=digest([fingerprints, settings]),
                    rows=rows,
                    cuts=cut_rows([(rows, 3 * 32 * 32 * rows)], *self._limits),
                )
            )
        return found

    def class_names(self) -> list[str]:
        """The data set's own; the ten digits of SVHN."""
        return self._loaded("test").class_names or [str(digit) for digit in range(10)]

    def labels(self, file: SourceFile) -> np.ndarray:
        """The labels of a split, int64 [rows]."""
        return np.concatenate([self._loaded(part).labels[numbers] for part, numbers in self._stretches(file.split)])

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """PNG bytes, 32 x 32 pixels."""
        places = [(part, int(number)) for part, numbers in self._stretches(file.split) for number in numbers]
        for part, number in places[first : None if last == UNKNOWN_ROWS else last]:
            loaded, stream = self._loaded(part), io.BytesIO()
            Image.fromarray(loaded.pixels[number]).save(stream, "PNG")
            path = f"{part}/{number:06d}.png"
            yield RawImage(stream.getvalue(), path, -1 if file.split == "unlabeled" else int(loaded.labels[number]))

    def location(self, file: SourceFile) -> str:
        """None: these images lie in no file of their own."""
        return ""

    def sha256(self, file: SourceFile) -> str:
        """None."""
        return ""

    def _stretches(self, split: str) -> list[tuple[str, np.ndarray]]:
        """Which images of which part of the data set a split has."""
        config, counts = self._config, IMAGES[self._config.dataset]
        order = np.random.default_rng(config.seed).permutation(counts["train"])
        labeled = config.num_val + (config.num_labeled or counts["train"])
        chosen = {
            "val": [("train", np.sort(order[: config.num_val]))],
            "labeled": [("train", np.sort(order[config.num_val : labeled]))],
            "test": [("test", np.arange(counts["test"]))],
            "unlabeled": [("train", np.sort(order[labeled:]))],
        }
        if "extra" in counts:
            chosen["unlabeled"].append(("extra", np.arange(counts["extra"])))
        assert set(chosen) == set(SPLITS)
        return [(part, numbers) for part, numbers in chosen[split] if len(numbers)]

    def _find(self, name: str) -> ExternalFile:
        found = self._folder.find(name)
        if not found:
            raise UserError(
                f"data.root: {name} is not below {self._root}; download it first: "
                f"torchvision.datasets.{self._config.dataset}(FOLDER, download=True)"
            )
        return found[0]

    def _fingerprints(self, part: str) -> list[str]:
        return self._folder.fingerprints([self._find(name) for name in FILES[self._config.dataset][part]])

    def _loaded(self, part: str) -> Unpacked:
        if part not in self._parts:
            root, fingerprints = str(self._folder.root), self._fingerprints(part)
            self._parts[part] = unpacked(self._config.dataset, part, root, fingerprints)
        return self._parts[part]
