"""Labeling: un-noised networks over whole shards, two Parquet files a shard. For pseudo labels and for evaluation."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from models.classifier import Classifier, NoisedClassifier, load_model
from models.configs import LabelConfig
from models.decode import clean_pixels, decode_pixels
from models.loader import IndexedImages, normalize
from models.memory import keep_freed_memory
from models.precision import autocast, computes_in_bfloat16, has_compiler
from models.predictions import (
    PREDICTIONS_FILE,
    PROBABILITIES_FILE,
    PROBABILITIES_GROUP_ROWS,
    key_hashes,
    predictions_table,
    probabilities_table,
)
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, find_part, get, publish_part
from storage.errors import StoreError
from storage.images import ImageError, decode_rgb
from storage.keys import digest
from storage.objects import Store
from storage.shards import ROW_GROUP_ROWS, shard_files, write_parquet

READ_AHEAD = 4  # images that are being decoded, a thread, while the device computes
Tables = tuple[pa.Table, pa.Table]  # predictions and probabilities of the same rows
BATCHES_ON_DEVICE = 2  # on a GPU a batch's result is read after the next one was sent


def label_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: predict the shards `spec["parts"]` (split, shard name, part key), publish a part for each.

    `spec`: store, stage, models (keys), source {kind, key}, parts, numerics, label (LabelConfig), unique (only first
    copies of a selection's images), gpu (its number), decoders (threads that decode ahead, for a GPU; 0: none). Batches are
    padded to a constant size and never cross shards, so a part's bytes depend on its shard, the networks, the config and
    the numerics alone. Raises StoreError on NaN or Inf, with the shard and key.
    """
    torch.set_num_threads(worker.threads)
    keep_freed_memory()
    store, stage, numerics = Store(spec["store"]), spec["stage"], spec["numerics"]
    source = get(store, spec["source"]["kind"], spec["source"]["key"])
    sizes = {entry.name: entry.rows or 0 for entry in source.files}
    whole = {split: _fits(store, shard_files(source, split)) for split in {split for split, _, _ in spec["parts"]}}
    done, total = 0, sum(sizes[name] for _, name, _ in spec["parts"])
    labeler: Labeler | None = None
    for split, name, part_key in spec["parts"]:
        if worker.stop_requested:
            raise Stopped
        if find_part(store, stage, part_key, numerics) is None:
            worker.at(name)
            labeler = labeler or Labeler(store, spec)  # loaded once, and only where something is missing
            images = IndexedImages(store, source, split, whole[split], only=name)
            tables, count = [labeler.tables([], labeler.nothing, labeler.nothing)], 0
            for batch in labeler.predict(images, images.rows_of(name, spec["unique"])):
                tables.append(batch)
                count += len(batch[0])
                worker.progress(done + count, total)
            _publish(store, stage, part_key, numerics, tables)
            images.close()
        done += sizes[name]
    worker.progress(total, total, last=True)
    return {}


class Labeler:
    """The networks of a label stage, loaded, and what it stores of their predictions."""

    def __init__(self, store: Store, spec: dict[str, Any]) -> None:
        self.config = LabelConfig.model_validate(spec["label"])
        self._batch, self._unique = spec["numerics"]["batch"], spec["unique"]
        device = spec["numerics"]["device"]
        self._device = device = f"cuda:{spec['gpu']}" if device == "cuda" else device
        self._threads = spec["decoders"]
        manifests = [get(store, "model", key) for key in spec["models"]]
        self._teachers = [Classifier(store, manifest, spec["numerics"], device) for manifest in manifests]
        self._noised: list[NoisedClassifier] = []
        if self.config.noised:
            self._noised = [NoisedClassifier(store, manifest, spec["numerics"], device) for manifest in manifests]
        self._crops = list(  # the different (image_size, crop_pct) that are needed, each computed once an image
            dict.fromkeys((t.image_size, v.crop_pct or t.crop_pct) for t in self._teachers for v in self.config.views)
        )
        self.nothing = np.zeros((0, len(manifests[0].metrics["class_names"])), np.float32)

    def predict(self, images: IndexedImages, rows: Sequence[int]) -> Iterator[Tables]:
        """The tables of rising rows of one shard, batch after batch.

        Raises StoreError naming shard and key where an image cannot be decoded or a prediction is not finite.
        """
        pending: deque[tuple[Sequence[int], torch.Tensor, np.ndarray | None]] = deque()
        inputs = self._inputs(images, rows)
        for start in range(0, len(rows), self._batch):
            some = rows[start : start + self._batch]
            batch = list(islice(inputs, len(some)))
            noised = self._predict_noised(images, some, [data for data, _ in batch]) if self._noised else None
            pending.append((some, self._predict_clean([views for _, views in batch]), noised))
            if self._device == "cpu" or len(pending) == BATCHES_ON_DEVICE:
                yield self._finished(images, *pending.popleft())
        while pending:
            yield self._finished(images, *pending.popleft())

    def tables(self, keys: list[str], clean: np.ndarray, targets: np.ndarray) -> Tables:
        """What is stored of probabilities float32 [n, classes]: the un-noised networks' and those for a student."""
        top_k = self.config.top_k
        if self.config.targets == "hard":
            targets, top_k = np.eye(targets.shape[1], dtype=np.float32)[targets.argmax(axis=1)], 1
        return predictions_table(keys, clean), probabilities_table(targets, top_k)

    def _inputs(self, images: IndexedImages, rows: Sequence[int]) -> Iterator[tuple[bytes, list[torch.Tensor]]]:
        """The bytes of each row and its crops; decoded here, or ahead by threads while the device computes."""

        def crop(row: int, data: bytes) -> tuple[bytes, list[torch.Tensor]]:
            try:
                pixels = decode_pixels(data)
            except ImageError as error:
                raise StoreError(f"{images.name_of(row)}: {error}") from error
            return data, [clean_pixels(pixels, *shape) for shape in self._crops]

        stream = zip(rows, images.bytes_in_order(rows), strict=True)
        if not self._threads:
            yield from (crop(row, data) for row, data in stream)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            yield from ahead((pool.submit(crop, row, data) for row, data in stream), self._threads * READ_AHEAD)

    def _predict_clean(self, crops: list[list[torch.Tensor]]) -> torch.Tensor:
        """Probabilities [2, n, classes] on the device, at temperature 1 and as stored: means over teachers and views.

        The batch is padded to its constant size with its first image.
        """
        padded = crops + crops[:1] * (self._batch - len(crops))
        stacked = [torch.stack(same) for same in zip(*padded, strict=True)]
        if self._device != "cpu":
            stacked = [images.pin_memory() for images in stacked]
        place = dict(zip(self._crops, stacked, strict=True))
        sums, temperature = [], self.config.temperature
        for teacher in self._teachers:
            for view in self.config.views:
                images = place[teacher.image_size, view.crop_pct or teacher.crop_pct]
                logits = _checked(teacher.logits(images.flip(2) if view.flip else images))
                sums.append(torch.stack([logits.softmax(-1), (logits / temperature).softmax(-1)]))
        return torch.stack(sums).mean(dim=0)[:, : len(crops)]

    def _predict_noised(self, images: IndexedImages, rows: Sequence[int], data: list[bytes]) -> np.ndarray:
        """Stored probabilities of the noised teachers, float32 [rows, classes]."""
        seeds = key_hashes(_keys(images, rows, self._unique))
        found = []
        for seed, encoded in zip(seeds, data, strict=True):
            picture, sums = decode_rgb(encoded), []
            for number, teacher in enumerate(self._noised):
                own = int(digest([self.config.seed, int(seed), number])[:15], 16)
                sums.append((_checked(teacher.logits(picture, own)) / self.config.temperature).softmax(-1))
            found.append(torch.cat(sums).mean(dim=0))
        return torch.stack(found).cpu().numpy()

    def _finished(
        self, images: IndexedImages, rows: Sequence[int], predicted: torch.Tensor, noised: np.ndarray | None
    ) -> Tables:
        """Read a batch's probabilities from the device. Raises StoreError where one is not finite."""
        clean, targets = predicted.cpu().numpy()
        targets = targets if noised is None else noised
        bad = ~(np.isfinite(clean).all(axis=1) & np.isfinite(targets).all(axis=1))
        if bad.any():
            row = rows[int(np.flatnonzero(bad)[0])]
            raise StoreError(
                f"{images.name_of(row)}: the network's output is not finite; retrain the model with a lower learning rate"
            )
        return self.tables(_keys(images, rows, self._unique), clean, targets)


def survey(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: what the choice of numerics hangs on, of the models `spec["models"]` (keys) and this machine.

    Returns macs (multiply-adds of one image in all models), bfloat16 (whether `spec["device"]` computes in it), compiler (whether
    torch.compile finds one).
    """
    from torch.utils.flop_counter import FlopCounterMode

    store, flops = Store(spec["store"]), 0
    for key in spec["models"]:
        model = load_model(store, get(store, "model", key))
        shape: Any = model.pretrained_cfg
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.to("meta")(torch.zeros(1, *shape["input_size"], device="meta"))
        flops += counter.get_total_flops()
    return {"macs": flops // 2, "bfloat16": computes_in_bfloat16(spec["device"]), "compiler": has_compiler()}


@torch.inference_mode()
def forward_probabilities(
    model: nn.Module, images: torch.Tensor, view: dict[str, Any], numerics: dict[str, Any]
) -> np.ndarray:
    """uint8 [n, size, size, 3] -> softmax probabilities float32 [n, classes]; of a network in training."""
    inputs = normalize(images.to(numerics["device"]), view["mean"], view["std"])
    if numerics["layout"] != "channels_last":
        inputs = inputs.contiguous()
    with autocast(numerics, numerics["device"]):
        logits = model(inputs)
    return logits.float().softmax(dim=-1).cpu().numpy()


def _fits(store: Store, shards: Sequence[FileEntry]) -> bool:
    """Whether all shards of a split may be kept on this machine: else each is streamed past."""
    return store.on_disk(shards) or store.fits_local(sum(shard.bytes for shard in shards))


def _checked(logits: torch.Tensor) -> torch.Tensor:
    """Logits [n, classes], with NaN all along a row that is not finite: of -Inf softmax would make an innocent 0."""
    return logits.masked_fill(~logits.isfinite().all(dim=1, keepdim=True), float("nan"))


def _keys(images: IndexedImages, rows: Sequence[int], unique: bool) -> list[str]:
    """The keys of some rows: of a selection's copies their source's."""
    keys: list[str] = images.index["source_key" if unique else "key"].take(pa.array(rows, pa.int64())).to_pylist()
    return keys


def ahead(work: Iterator[Future[Any]], most: int) -> Iterator[Any]:
    """The results of submitted work in its order, with at most so many pieces submitted and not yet taken."""
    waiting: deque[Future[Any]] = deque(islice(work, most))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(islice(work, 1))
        yield result


def _publish(store: Store, stage: str, part_key: str, numerics: dict[str, Any], tables: list[Tables]) -> None:
    with store.staging() as folder:
        files = {}
        for name, parts in zip((PREDICTIONS_FILE, PROBABILITIES_FILE), zip(*tables, strict=True), strict=True):
            table = pa.concat_tables(parts).combine_chunks()
            write_parquet(
                folder / name, table, ROW_GROUP_ROWS if name == PREDICTIONS_FILE else PROBABILITIES_GROUP_ROWS
            )
            files[name] = (folder / name, len(table))
        publish_part(store, stage, part_key, numerics, files)
