"""Predictions of altered images: corrupted, attacked, perturbed, or published ones; a Parquet file for each alteration.

The same loop as labeling's (models/inference.py): images are read in one pass, batches have a constant size, and each
finished piece is a part that no crash takes back. Of one decoded image all severities (or epsilons) are made.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from models.attacks import PixelNetwork, attack
from models.classifier import Classifier, load_model
from models.corruptions.apply import corrupt, noise_of
from models.inference import READ_AHEAD, ahead
from models.memory import keep_freed_memory
from models.perturbations import sequence
from models.tested_images import Encoded, Row, View, decoded, encoded_images
from models.worker import Stopped, Worker
from storage.artifacts import Manifest, find_part, get, publish_part
from storage.errors import StoreError
from storage.objects import Store
from storage.shards import write_parquet

STAGE = "robustness"  # of the parts
FILE = "predictions.parquet"
TOP_K = 5

Variant = dict[str, Any]


def predictions_schema(num_classes: int) -> pa.Schema:
    """key, frame (0 but in sequences), label (of the model's classes), the likeliest classes, the first one's probability."""
    top = pa.list_(pa.int32(), min(TOP_K, num_classes))
    fields = [("key", pa.string()), ("frame", pa.int32()), ("label", pa.int32()), ("top_classes", top)]
    return pa.schema([*fields, ("confidence", pa.float32())])


def predict_altered(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: for each of `spec["jobs"]` predict its images in all its variants, publish a part for each variant.

    `spec`: store, model (key), numerics, gpu, decoders, alteration (name and settings), stored (images are seen whole), restrict
    (the classes that may be predicted, or none), jobs: name, count, images, parts [(part key, variant)].
    """
    torch.set_num_threads(worker.threads)
    keep_freed_memory()
    store, numerics = Store(spec["store"]), spec["numerics"]
    done, total = 0, sum(job["count"] * len(job["parts"]) for job in spec["jobs"])
    network: Altered | None = None
    for job in spec["jobs"]:
        missing = [(key, variant) for key, variant in job["parts"] if not find_part(store, STAGE, key, numerics)]
        if missing:
            worker.at(job["name"])
            network = network or ALTERATIONS[spec["alteration"]["name"]](store, spec)
            tables: list[list[pa.Table]] = [[network.nothing] for _ in missing]
            variants = [variant for _, variant in missing]
            for rows in network.batches(encoded_images(store, job["images"]), variants):
                if worker.stop_requested:
                    raise Stopped
                found = network.predict(rows, variants)
                for place, logits in enumerate(found):
                    tables[place].append(network.table(rows, logits, job["name"]))
                worker.progress(done + sum(len(own) for own in tables[0]) * len(missing), total)
            for (key, _), own in zip(missing, tables, strict=True):
                _publish(store, key, numerics, pa.concat_tables(own))
        done += job["count"] * len(job["parts"])
    worker.progress(total, total, last=True)
    return {}


class Altered(Protocol):
    """A network and what is done to its images."""

    nothing: pa.Table

    def __init__(self, store: Store, spec: dict[str, Any]) -> None: ...

    def batches(self, images: Iterable[Encoded], variants: Sequence[Variant]) -> Iterator[list[Row]]:
        """The decoded pictures in batches of at most the constant size."""
        ...

    def predict(self, rows: list[Row], variants: Sequence[Variant]) -> list[np.ndarray]:
        """For each variant float32 logits [rows, classes]."""
        ...

    def table(self, rows: list[Row], logits: np.ndarray, where: str) -> pa.Table:
        """What is stored of a batch. Raises StoreError where a logit is not finite."""
        ...


class _Predictor:
    """What all alterations share: reading ahead, batches, ranks and confidences."""

    def __init__(self, store: Store, spec: dict[str, Any]) -> None:
        self._batch, device = spec["numerics"]["batch"], spec["numerics"]["device"]
        self._device = f"cuda:{spec['gpu']}" if device == "cuda" else device
        self._threads, self._settings = spec["decoders"], spec["alteration"]
        self._restrict = None if spec["restrict"] is None else np.array(sorted(spec["restrict"]))
        model = get(store, "model", spec["model"])
        image_size, crop_pct = self._load(store, model, spec["numerics"])
        self._view = View(image_size, crop_pct, spec["stored"])
        num_classes = len(model.metrics["class_names"] if self._restrict is None else self._restrict)
        self.nothing = predictions_schema(num_classes).empty_table()

    def _load(self, store: Store, model: Manifest, numerics: dict[str, Any]) -> tuple[int, float]:
        """Load the network; its image size and crop."""
        self._classifier = Classifier(store, model, numerics, self._device)
        return self._classifier.image_size, self._classifier.crop_pct

    def batches(self, images: Iterable[Encoded], variants: Sequence[Variant]) -> Iterator[list[Row]]:
        """As `Altered` says."""
        rows = (row for made in self._decoded(images, variants) for row in made)
        while batch := list(islice(rows, self._batch)):
            yield batch

    def table(self, rows: list[Row], logits: np.ndarray, where: str) -> pa.Table:
        if not np.isfinite(logits).all():
            bad = rows[int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])]
            raise StoreError(
                f"{where}, {bad.key}: the network's output is not finite; retrain the model with a lower learning rate"
            )
        if self._restrict is not None:
            logits = logits[:, self._restrict]
        top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
        scaled = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        classes = top if self._restrict is None else self._restrict[top]
        columns = [
            pa.array([row.key for row in rows], pa.string()),
            pa.array([row.frame for row in rows], pa.int32()),
            pa.array([row.label for row in rows], pa.int32()),
            pa.FixedSizeListArray.from_arrays(pa.array(classes.astype(np.int32).reshape(-1)), classes.shape[1]),
            pa.array((1 / scaled.sum(axis=1)).astype(np.float32)),
        ]
        return pa.Table.from_arrays(columns, schema=self.nothing.schema)

    def _decoded(self, images: Iterable[Encoded], variants: Sequence[Variant]) -> Iterator[list[Row]]:
        if not self._threads:
            yield from (self._rows(image, variants) for image in images)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            waiting = (pool.submit(self._rows, image, variants) for image in images)
            yield from ahead(waiting, self._threads * READ_AHEAD)

    def _rows(self, image: Encoded, variants: Sequence[Variant]) -> list[Row]:
        """The pictures of one image; of a video its frames."""
        return decoded(image, self._view)

    def _logits(self, pixels: Sequence[torch.Tensor]) -> np.ndarray:
        """The network's logits of a batch, which is padded to its constant size with its first image."""
        padded = [*pixels, *[pixels[0]] * (self._batch - len(pixels))]
        return self._classifier.logits(torch.stack(padded))[: len(pixels)].cpu().numpy()


class AsTheyAre(_Predictor):
    """Nothing is done to the images: published benchmarks."""

    def predict(self, rows: list[Row], variants: Sequence[Variant]) -> list[np.ndarray]:
        """One variant."""
        return [self._logits([row.pixels for row in rows])] * len(variants)


class Perturbed(AsTheyAre):
    """One variant, {kind}: each image becomes a sequence; settings: table (of levels), seed."""

    def _rows(self, image: Encoded, variants: Sequence[Variant]) -> list[Row]:
        (variant,) = variants
        side = self._view.image_size
        (seen,) = decoded(image, View(math.floor(side / self._view.crop_pct), 1.0))  # with what lies around the crop
        rng = noise_of(self._settings["seed"], variant["kind"], 0, image.key)
        frames = sequence(seen.pixels.numpy(), side, variant["kind"], rng, self._settings["table"])
        return [Row(image.key, image.label, n, torch.from_numpy(frame)) for n, frame in enumerate(frames)]


class Corrupted(_Predictor):
    """Variants are {kind, severity}; settings: table (of levels), seed. Noise belongs to the image's key, not to a batch."""

    def predict(self, rows: list[Row], variants: Sequence[Variant]) -> list[np.ndarray]:
        """Each image corrupted in each way."""
        if not self._threads:
            return [self._logits([self._corrupted(row, variant) for row in rows]) for variant in variants]
        with ThreadPoolExecutor(self._threads) as pool:
            pieces = [[pool.submit(self._corrupted, row, variant) for row in rows] for variant in variants]
            return [self._logits([piece.result() for piece in own]) for own in pieces]

    def _corrupted(self, row: Row, variant: Variant) -> torch.Tensor:
        kind, severity = variant["kind"], variant["severity"]
        rng = noise_of(self._settings["seed"], kind, severity, row.key)
        return torch.from_numpy(corrupt(row.pixels.numpy(), kind, severity, rng, self._settings["table"]))


class Attacked(_Predictor):
    """Variants are {epsilon}, of pixels in [0, 1]; settings: method, and of pgd steps and step_share. In eager float32."""

    def _load(self, store: Store, model: Manifest, numerics: dict[str, Any]) -> tuple[int, float]:
        network = load_model(store, model)
        shape: Any = network.pretrained_cfg
        self._network = PixelNetwork(network, shape["mean"], shape["std"]).to(self._device)
        return int(shape["input_size"][-1]), float(shape["crop_pct"])

    def predict(self, rows: list[Row], variants: Sequence[Variant]) -> list[np.ndarray]:
        """Each image attacked with each epsilon, away from its true class; epsilon 0 is the clean image."""
        padded = [*rows, *rows[:1] * (self._batch - len(rows))]
        images = torch.stack([row.pixels for row in padded]).to(self._device).permute(0, 3, 1, 2) / 255
        labels = torch.tensor([row.label for row in padded], device=self._device)
        made = attack(self._network, images, labels, self._settings, [variant["epsilon"] for variant in variants])
        with torch.inference_mode():
            return [self._network(moved)[: len(rows)].cpu().numpy() for moved in made]


ALTERATIONS: dict[str, type[Altered]] = {
    "none": AsTheyAre,
    "corruption": Corrupted,
    "sequence": Perturbed,
    "attack": Attacked,
}


def _publish(store: Store, key: str, numerics: dict[str, Any], table: pa.Table) -> None:
    with store.staging() as folder:
        write_parquet(folder / FILE, table.combine_chunks())
        publish_part(store, STAGE, key, numerics, {FILE: (folder / FILE, len(table))})
