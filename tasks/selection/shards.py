"""Output shards: the chosen copies with image, soft label and facts, as WebDataset tars with a Parquet index."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from models.predictions import read_probabilities
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Manifest, find_parts, get, publish_part
from storage.errors import StoreError
from storage.images import image_extension
from storage.objects import Store
from storage.shards import (
    INDEX_SCHEMA,
    ShardReader,
    ShardSample,
    index_name,
    npy_bytes,
    read_rows,
    shard_files,
    write_parquet,
    write_tar,
)
from tasks.ingest import NO_NUMERICS
from tasks.label import model_roles
from tasks.selection.layout import shards_of_file
from tasks.selection.scatter import Scatter

STAGE = "select"  # of the parts
GATHER_BYTES = 256 << 20  # of soft labels in memory
PASS_COPIES = 1 << 23  # for so many one pass over the input is made: 16 GB of soft labels of 1,000 classes
IMAGE_FACTS = tuple(name for name in INDEX_SCHEMA.names if name != "label")  # the label is the predicted one
SELECTION_SCHEMA = pa.schema(
    [
        *INDEX_SCHEMA,
        ("source_key", pa.string()),
        ("copy", pa.int32()),
        ("confidence", pa.float32()),
        ("soft_offset", pa.int64()),  # of the soft label's .npy in the tar
        ("soft_bytes", pa.int64()),
        ("soft_sha256", pa.string()),
    ]
)


def write_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: write the output shards `spec["parts"]` (number -> part key), each a part.

    `spec`: store, data and labels (keys), shard_images, parts, layout (number of a layout file -> its entry). Reads each
    input shard's index and labels once, so a spec should have many shards, of up to `PASS_COPIES` copies. Memory:
    `GATHER_BYTES` of soft labels (at least one shard's) and 30 bytes a copy. Local disk: the copies' soft labels and facts.
    """
    store, shard_images = Store(spec["store"]), spec["shard_images"]
    layout = {int(number): FileEntry.model_validate(entry) for number, entry in spec["layout"].items()}
    found = find_parts(store, STAGE, list(spec["parts"].values()), NO_NUMERICS)
    missing = sorted((int(number), key) for number, key in spec["parts"].items() if found[key] is None)
    total = len(spec["parts"]) * shard_images
    done = total - len(missing) * shard_images
    if missing:
        source = _Source(store, get(store, "dataset", spec["data"]), get(store, "labels", spec["labels"]))
        records = [layout_rows(store, layout[n // shards_of_file(shard_images)], n, shard_images) for n, _ in missing]
        at_once = max(1, GATHER_BYTES // (2 * source.num_classes * shard_images))
        parts = iter(missing)
        with store.staging() as folder:
            scatter = Scatter(folder, at_once * shard_images, source.num_classes)
            source.scatter(pa.concat_tables(records), scatter, worker)
            for facts, soft_labels in scatter.groups():
                for first in range(0, len(facts), shard_images):
                    _stop_if_asked(worker)
                    rows = facts.slice(first, shard_images).to_pylist()
                    number, key = next(parts)
                    worker.at(f"shards/train/{number:05d}.tar")
                    source.write_shard(key, rows, soft_labels[first : first + shard_images])
                    done += len(rows)
                    worker.progress(done, total)
    worker.progress(total, total, last=True)
    return {}


def layout_rows(store: Store, layout: FileEntry, number: int, shard_images: int) -> pa.Table:
    """The rows of output shard `number` in its layout file: image, copy, in the shard's order."""
    first = number % shards_of_file(shard_images) * shard_images
    return read_rows(store, layout, np.arange(first, min(first + shard_images, layout.rows or 0)))


class _Source:
    """A data set's unlabeled images with their labels: what output shards are made of."""

    def __init__(self, store: Store, data: Manifest, labels: Manifest) -> None:
        self._store, self._data, self._labels = store, data, labels
        self._shards = shard_files(data, "unlabeled")
        self._indices = data.files_named(index_name(shard) for shard in self._shards)
        self._predictions = labels.files_under("predictions/")
        self._probabilities = labels.files_under("probabilities/")
        self._starts = np.cumsum([0, *(shard.rows or 0 for shard in self._shards)])
        self._reader = ShardReader(store, self._shards)
        self._teachers = [labels.inputs[role] for role in model_roles(labels.inputs)]
        self.num_classes = len(labels.metrics["class_names"])

    def scatter(self, records: pa.Table, scatter: Scatter, worker: Worker) -> None:
        """Hand out the facts and the soft label of each copy, at its place in `records`. Each file is read once.

        Raises StoreError where index and labels name different images.
        """
        images, copies = records["image"].to_numpy(), records["copy"].to_numpy()
        order = np.argsort(images, kind="stable")
        bounds = np.searchsorted(images, self._starts, sorter=order)
        for number, entry in enumerate(self._probabilities):
            places = order[bounds[number] : bounds[number + 1]]
            if not len(places):
                continue
            _stop_if_asked(worker)
            worker.at(self._shards[number].name)
            rows = images[places] - self._starts[number]
            facts = self._facts(number, rows).append_column("copy", pa.array(copies[places]))
            scatter.add(places, facts, read_probabilities(self._store, self._labels, entry, rows))

    def _facts(self, number: int, rows: np.ndarray) -> pa.Table:
        """Where images of input shard `number` lie, and how they were labeled."""
        shard = self._shards[number]
        index = read_rows(self._store, self._indices[number], rows, IMAGE_FACTS)
        labeled = read_rows(self._store, self._predictions[number], rows, ("key", "label", "confidence"))
        if index["key"] != labeled["key"]:
            raise StoreError(
                f"labels {self._labels.key} and data set {self._data.key} name different images in shard {number}; the labels "
                "are of another data set"
            )
        for name in ("label", "confidence"):
            index = index.append_column(name, labeled[name])
        shards = pa.array([shard.path] * len(rows), pa.string())
        return index.rename_columns({"key": "source_key"}).append_column("shard", shards)

    def write_shard(self, part_key: str, rows: list[dict[str, Any]], soft_labels: np.ndarray) -> None:
        """Write one output shard and its index, and publish them as a part."""
        with self._store.staging() as folder:
            places = write_tar(folder / "shard.tar", self._samples(rows, soft_labels))
            for row, place in zip(rows, places, strict=True):
                row["offset"], row["bytes"] = place[row["extension"]]
                row["soft_offset"], row["soft_bytes"] = place["npy"]
            columns = [{name: row[name] for name in SELECTION_SCHEMA.names} for row in rows]
            write_parquet(folder / "index.parquet", pa.Table.from_pylist(columns, SELECTION_SCHEMA))
            files = {name: (folder / name, len(rows)) for name in ("shard.tar", "index.parquet")}
            publish_part(self._store, STAGE, part_key, NO_NUMERICS, files)

    def _samples(self, rows: list[dict[str, Any]], soft_labels: np.ndarray) -> Iterator[ShardSample]:
        """The samples of a shard; completes their rows."""
        for row, soft in zip(rows, soft_labels, strict=True):
            image = self._reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"])
            facts = {
                "class": row["label"],
                "confidence": row["confidence"],
                "labeled_by": self._teachers,
                "source_key": row["source_key"],
                "source": row["source"],
                "copy": row["copy"],
            }
            label = npy_bytes(soft)
            row["key"] = f"{row['source_key']}-c{row['copy']}"
            row["extension"] = image_extension(image)
            row["soft_sha256"] = hashlib.sha256(label).hexdigest()
            members = {row["extension"]: image, "npy": label, "json": json.dumps(facts, sort_keys=True).encode()}
            yield ShardSample(row["key"], members)


def _stop_if_asked(worker: Worker) -> None:
    if worker.stop_requested:
        raise Stopped
