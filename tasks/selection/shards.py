"""Output shards: the chosen copies with image, soft label and facts, as WebDataset tars with a Parquet index."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from models.predictions import read_probabilities
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Manifest, find_part, get, publish_part
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
from tasks.selection.layout import shards_of_file

STAGE = "select"  # of the parts
GATHER_BYTES = 256 << 20  # of soft labels in memory
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

    `spec`: store, data and labels (keys), shard_images, parts, layout (number of a layout file -> its entry). Several
    shards are gathered at once, because each has images of almost every input shard. Memory: `GATHER_BYTES` of soft
    labels, at least one shard's.
    """
    store, shard_images = Store(spec["store"]), spec["shard_images"]
    source = _Source(store, get(store, "dataset", spec["data"]), get(store, "labels", spec["labels"]))
    layout = {int(number): FileEntry.model_validate(entry) for number, entry in spec["layout"].items()}
    numbers = [int(number) for number in spec["parts"]]
    at_once = max(1, GATHER_BYTES // (2 * source.num_classes * shard_images))
    done, total = 0, len(numbers) * shard_images
    for start in range(0, len(numbers), at_once):
        group = numbers[start : start + at_once]
        missing = [n for n in group if find_part(store, STAGE, spec["parts"][str(n)], NO_NUMERICS) is None]
        records = [layout_rows(store, layout[n // shards_of_file(shard_images)], n, shard_images) for n in missing]
        done += (len(group) - len(missing)) * shard_images
        if not missing:
            continue
        facts, soft_labels = source.gather(pa.concat_tables(records))
        first = 0
        for number, own in zip(missing, records, strict=True):
            if worker.stop_requested:
                raise Stopped
            rows = slice(first, first + len(own))
            source.write_shard(spec["parts"][str(number)], facts[rows], soft_labels[rows])
            first, done = rows.stop, done + len(own)
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
        self._predictions = labels.files_under("predictions/")
        self._probabilities = labels.files_under("probabilities/")
        self._starts = np.cumsum([0, *(shard.rows or 0 for shard in self._shards)])
        self._reader = ShardReader(store, self._shards)
        self.num_classes = len(labels.metrics["class_names"])

    def gather(self, records: pa.Table) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Of each copy its facts, and its soft label, float16 [copies, classes]. Each file is read once.

        Raises StoreError where index and labels name different images.
        """
        images = records["image"].to_numpy()
        files = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[files]
        order = np.argsort(files, kind="stable")
        soft_labels = np.empty((len(files), self.num_classes), np.float16)
        tables = []
        for number in np.unique(files).tolist():
            places = order[slice(*np.searchsorted(files[order], [number, number + 1]))]
            tables.append(self._facts(number, rows[places]))
            entry = self._probabilities[number]
            soft_labels[places] = read_probabilities(self._store, self._labels, entry, rows[places])
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        facts = pa.concat_tables(tables).take(pa.array(back)).append_column("copy", records["copy"])
        return facts.to_pylist(), soft_labels

    def _facts(self, number: int, rows: np.ndarray) -> pa.Table:
        """Where images of input shard `number` lie, and how they were labeled."""
        shard = self._shards[number]
        index = read_rows(self._store, self._data.file(index_name(shard)), rows, IMAGE_FACTS)
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
                "labeled_by": self._labels.inputs["model"],
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
