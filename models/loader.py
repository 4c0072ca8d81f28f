"""Batches for training: a pure function of the step, built in loader processes.

Position p of a stream is row `order.rows(p)` of its index, noised by a generator seeded with p. Batch `step` holds, for
each replica, its share of labeled and unlabeled positions. So a loader may start at any step, in any process.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from models.configs import NoiseConfig, TrainConfig
from models.decode import decode_pixels
from models.launch import make_room_for_sockets
from models.noise import as_picture, clean_view, noised_view
from models.order import LABELED_STREAM, UNLABELED_STREAM, SampleOrder, sample_rng
from models.worker import die_with_parent
from storage.artifacts import Manifest
from storage.errors import StoreError, UserError
from storage.images import ImageError, decode_rgb
from storage.objects import Store
from storage.shards import ShardReader, read_index, shard_files

PREFETCH_BATCHES = 4
BATCH_TIMEOUT_S = 900  # far above what a store that fails and comes back may take; past it a run ends, and is not hung
NICENESS = 15
CACHE_BYTES = 512 << 20  # decoded pixels that a process keeps of one split: small data sets are decoded once


@dataclass
class ReplicaBatch:
    """One replica's images uint8 [n + m, size, size, 3], labels int64 [n], pseudo labels float32 [m, classes].

    For a teacher that works online: instead of pseudo labels its clean views, uint8 [m, its size, its size, 3].
    """

    images: torch.Tensor
    labels: torch.Tensor
    pseudo_labels: torch.Tensor
    clean: torch.Tensor


@dataclass(frozen=True)
class CleanView:
    """What an online teacher sees of an image: the side of its square in pixels, and its center crop."""

    image_size: int
    crop_pct: float


class IndexedImages:
    """The images of one split by row: an index in memory, bytes read and verified on demand."""

    def __init__(
        self, store: Store, manifest: Manifest, split: str, whole: bool | None = True, only: str | None = None
    ) -> None:
        """`whole`: read a bucket's tars from copies on this machine; None: only where all of them fit. `only`: the
        name of one shard, where the index of all would fill the memory."""
        self.files = [shard for shard in shard_files(manifest, split) if only in (None, shard.name)]
        index = read_index(store, manifest, split, shards=self.files)
        self.index = index
        self.shard_rows = [entry.rows or 0 for entry in self.files]
        shard = index["shard"].combine_chunks()
        shard = shard.chunk(0) if isinstance(shard, pa.ChunkedArray) else shard
        self._shards = shard.dictionary.to_pylist()
        self._shard_of = shard.indices.to_numpy()
        self._offset = index["offset"].to_numpy()
        self._bytes = index["bytes"].to_numpy()
        self._sha256 = index["sha256"]
        pixels = pc.sum(pc.multiply(index["width"].cast(pa.int64()), index["height"].cast(pa.int64()))).as_py() or 0
        self._decoded: dict[int, Any] | None = {} if pixels * 3 <= CACHE_BYTES else None
        self.labels = index["label"].to_numpy()
        self._reader = ShardReader(store, self.files, whole)

    def __len__(self) -> int:
        return len(self._offset)

    def rows_of(self, shard_name: str, unique: bool = False) -> list[int]:
        """The rows of a shard by its logical name; with `unique`, only those that are an image's first copy."""
        number = [entry.name for entry in self.files].index(shard_name)
        start = sum(self.shard_rows[:number])
        rows = range(start, start + self.shard_rows[number])
        if not unique:
            return list(rows)
        copies = self.index["copy"].to_numpy()
        return [row for row in rows if copies[row] == 0]

    def shard_path(self, row: int) -> str:
        """The object that holds a row's bytes."""
        return str(self._shards[self._shard_of[row]])

    def image(self, row: int) -> Image.Image:
        """The decoded RGB image of a row, not to be changed. Raises StoreError where its bytes are not the index's."""
        found = self._known(row, decode_rgb)
        return as_picture(found) if isinstance(found, torch.Tensor) else found

    def pixels(self, row: int) -> torch.Tensor:
        """The same as uint8 [3, height, width], sooner: the same pixels, bit for bit (models/decode.py)."""
        found = self._known(row, decode_pixels)
        return found if isinstance(found, torch.Tensor) else torch.from_numpy(np.array(found)).permute(2, 0, 1)

    def bytes_in_order(self, rows: Sequence[int]) -> Iterator[bytes]:
        """The encoded images of rising rows of one shard, in one pass over it. Raises StoreError as `image` does."""
        if rows:
            yield from self._reader.stream(self.shard_path(rows[0]), (self._place(row) for row in rows))

    def close(self) -> None:
        """Close the tars."""
        self._reader.close()

    def name_of(self, row: int) -> str:
        """Where a row's image lies, for messages: shard and key."""
        return f"shard {self.shard_path(row)}, sample {self.index['key'][row].as_py()}"

    def _place(self, row: int) -> tuple[int, int, str]:
        return int(self._offset[row]), int(self._bytes[row]), self._sha256[row].as_py()

    def _known(self, row: int, decode: Callable[[bytes], Any]) -> Any:
        """What a row's bytes were decoded to, now or before."""
        if self._decoded is not None and row in self._decoded:
            return self._decoded[row]
        try:
            decoded = decode(self._reader.read(self.shard_path(row), *self._place(row)))
        except ImageError as error:
            raise StoreError(f"{self.name_of(row)}: {error}") from error
        if self._decoded is not None:
            self._decoded[row] = decoded
        return decoded


class LabelsByRow(Protocol):
    """Pseudo labels of the unlabeled images (models/pseudo_labels.py)."""

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Probabilities of these rows, float32 [rows, classes]."""
        ...


class TrainingBatches(Dataset):
    """`self[step]` is the list of the batches of `replicas`, in their order."""

    def __init__(
        self,
        config: TrainConfig,
        labeled: IndexedImages,
        unlabeled: IndexedImages | None,
        pseudo_labels: LabelsByRow | None,
        replicas: Sequence[int],
        online: CleanView | None = None,
    ) -> None:
        self._config, self._replicas, self._online = config, replicas, online
        self._labeled, self._unlabeled, self._pseudo_labels = labeled, unlabeled, pseudo_labels
        shuffle = config.shuffle_shards
        self._labeled_order = SampleOrder(labeled.shard_rows, config.seed, LABELED_STREAM, shuffle)
        if unlabeled is not None:
            self._unlabeled_order = SampleOrder(unlabeled.shard_rows, config.seed, UNLABELED_STREAM, shuffle)

    @property
    def images_a_step(self) -> int:
        """Images of a global batch."""
        own = len(self.labeled_rows(0, 0)[1]) + len(self.unlabeled_rows(0, 0)[1])
        return self._config.replicas * own

    def labeled_rows(self, step: int, replica: int) -> tuple[int, np.ndarray]:
        """A replica's labeled images of a step: the first one's position in its stream, and the rows, int64 [n]."""
        n = self._config.replica_labeled if self._config.train_on == "both" or self._unlabeled is None else 0
        start = (step * self._config.replicas + replica) * n
        return start, self._labeled_order.rows(start, n)

    def unlabeled_rows(self, step: int, replica: int) -> tuple[int, np.ndarray]:
        """The same of the unlabeled images, int64 [m]; none for a teacher."""
        if self._unlabeled is None:
            return 0, np.zeros(0, np.int64)
        m = self._config.replica_unlabeled
        start = (step * self._config.replicas + replica) * m
        return start, self._unlabeled_order.rows(start, m)

    def __getitem__(self, step: int) -> list[ReplicaBatch]:
        return [self._replica(step, replica) for replica in self._replicas]

    def _replica(self, step: int, replica: int) -> ReplicaBatch:
        config = self._config
        start, rows = self.labeled_rows(step, replica)
        images = [
            self._noised(self._labeled, row, config.noise, LABELED_STREAM, start + i) for i, row in enumerate(rows)
        ]
        labels = torch.from_numpy(self._labeled.labels[rows].astype(np.int64))
        pseudo = clean = torch.zeros(0)
        if self._unlabeled is not None:
            noise = config.unlabeled_noise or config.noise
            start, rows = self.unlabeled_rows(step, replica)
            for i, row in enumerate(rows):
                images.append(self._noised(self._unlabeled, row, noise, UNLABELED_STREAM, start + i))
            if self._online is not None:
                views = map(self._unlabeled.image, rows)
                clean = clean_batch(views, self._online.image_size, self._online.crop_pct)
            elif self._pseudo_labels is not None:
                pseudo = torch.from_numpy(self._pseudo_labels.rows(rows))
        return ReplicaBatch(torch.from_numpy(np.stack(images)), labels, pseudo, clean)

    def _noised(self, part: IndexedImages, row: int, noise: NoiseConfig, stream: int, position: int) -> np.ndarray:
        rng = sample_rng(self._config.seed, stream, position)
        image = part.pixels(row) if noise.crop == "resized" else part.image(row)
        return noised_view(image, noise, self._config.model.image_size, rng)


def training_loader(
    batches: TrainingBatches, first_step: int, last_step: int, workers: int
) -> Iterator[list[ReplicaBatch]]:
    """Batches of the steps [first_step, last_step) in order, made ahead by `workers` processes (0: in this one)."""
    if workers:
        make_room_for_sockets()
    loader: DataLoader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=workers,
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        timeout=BATCH_TIMEOUT_S if workers else 0,
        worker_init_fn=_begin_loader if workers else None,
    )
    return _in_own_words(iter(loader))


def _in_own_words(batches: Iterator[list[ReplicaBatch]]) -> Iterator[list[ReplicaBatch]]:
    """The batches; what a user has to know in its own line, without the traceback that torch puts around it."""
    try:
        yield from batches
    except UserError as error:
        name = f"\n{type(error).__module__}.{type(error).__qualname__}: "
        raise type(error)(str(error).rpartition(name)[2].strip()) from error


def _begin_loader(_number: int) -> None:
    """Where cores are short, the training goes first: it waits when no batch is ready, and then the loaders have them.

    A group of its own: Prefect's Cancel sends SIGTERM to the whole process group, and torch's loss of a loader would be
    an error in the training just where it writes its checkpoint. It ends with the training all the same.
    """
    os.nice(NICENESS)
    os.setpgid(0, 0)
    os.environ["NST_PARENT"] = str(os.getppid())
    die_with_parent()


def clean_batch(images: Iterable[Any], size: int, crop_pct: float) -> torch.Tensor:
    """The clean views of some decoded images, uint8 [images, size, size, 3]."""
    return torch.from_numpy(np.stack([clean_view(image, size, crop_pct) for image in images]))


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [n, h, w, 3] in 0-255 -> float32 [n, 3, h, w], normalized by channel, channels-last in memory."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return torch.addcmul(shift, images.to(torch.float32), scale).permute(0, 3, 1, 2)
