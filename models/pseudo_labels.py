"""The pseudo labels that a student reads, by row of its selection: baked into the shards, or of a label artifact.

A label artifact (order=once) may be far larger than the memory: 81 million images of 1000 classes are 160 GB. Its rows are
found by joining keys once, and read by row group when a batch asks for them.
"""

import io
from collections import OrderedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.loader import CACHE_BYTES, IndexedImages
from models.predictions import read_predictions, restore_probabilities
from storage.artifacts import FileEntry, Manifest
from storage.errors import StoreError
from storage.objects import Store
from storage.shards import ShardReader

OPEN_FILES = 64


class PseudoLabels:
    """Pseudo labels of a selection by row: those baked into its shards, or a label artifact's, joined by key."""

    def __init__(self, store: Store, selection: Manifest, images: IndexedImages, labels: Manifest | None) -> None:
        self._source = _JoinedLabels(store, images, labels) if labels is not None else _BakedLabels(store, images)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Probabilities of these rows, float32 [rows, classes]."""
        return np.stack([self._source.row(int(row)) for row in rows]).astype(np.float32)


class _BakedLabels:
    """`.npy` members of the selection's tars, each verified."""

    def __init__(self, store: Store, images: IndexedImages) -> None:
        self._images = images
        self._reader = ShardReader(store, images.files, whole=True)
        self._read: dict[int, np.ndarray] = {}
        self._offset = images.index["soft_offset"].to_numpy()
        self._bytes = images.index["soft_bytes"].to_numpy()
        self._sha256 = images.index["soft_sha256"]

    def row(self, row: int) -> np.ndarray:
        if row in self._read:
            return self._read[row]
        place = int(self._offset[row]), int(self._bytes[row])
        data = self._reader.read(self._images.shard_path(row), *place, self._sha256[row].as_py())
        label: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
        if len(self._images) * label.nbytes <= CACHE_BYTES:
            self._read[row] = label
        return label


class _JoinedLabels:
    """Rows of a label artifact by the key of a copy's source; row groups stay decoded while there is room for them."""

    def __init__(self, store: Store, images: IndexedImages, labels: Manifest) -> None:
        self._store, self._num_classes = store, len(labels.metrics["class_names"])
        keys = read_predictions(store, labels, ["key"])["key"]
        place = pc.index_in(images.index["source_key"], value_set=keys)
        if place.null_count:
            first = images.index["source_key"].filter(pc.is_null(place))[0].as_py()
            raise StoreError(f"labels {labels.key} have no label for image {first!r}; they are of another selection")
        self._place = place.to_numpy()
        self._files = labels.files_under("probabilities/")
        self._starts = np.cumsum([0, *(entry.rows or 0 for entry in self._files)])
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._bytes = 0

    def row(self, row: int) -> np.ndarray:
        place = int(self._place[row])
        file = int(np.searchsorted(self._starts, place, side="right")) - 1
        group_rows = self._reader(file, self._files[file]).metadata.row_group(0).num_rows
        group, within = divmod(place - int(self._starts[file]), group_rows)
        found: np.ndarray = self._group(file, group)[within]
        return found

    def _group(self, file: int, group: int) -> np.ndarray:
        """float16 [rows, classes]."""
        key = (file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        entry = self._files[file]
        try:
            table = self._reader(file, entry).read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{entry.path} cannot be read as Parquet ({error})") from error
        self._groups[key] = restore_probabilities(table, self._num_classes)
        self._bytes += self._groups[key].nbytes
        while self._bytes > CACHE_BYTES and len(self._groups) > 1:
            self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return self._groups[key]

    def _reader(self, file: int, entry: FileEntry) -> pq.ParquetFile:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        with self._store.local_copy(entry) as path:  # verified; an open file outlives its name
            self._open[file] = pq.ParquetFile(path.open("rb"))
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close(force=True)
        return self._open[file]
