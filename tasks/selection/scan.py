"""The predictions of a label artifact in passes over all images: blocks in order, several computed at once.

The columns that rules depend on are copied once out of Parquet, into plain arrays on local disk (16 bytes an image): a
pass over them takes no memory and a second for 100 million images, so that the selection can afford several.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import FileEntry, Manifest
from storage.errors import StoreError
from storage.objects import TRANSFERS, Store
from storage.shards import ROW_GROUP_ROWS, read_rows

AHEAD = 2 * TRANSFERS  # results that may wait for an earlier one
BLOCK_IMAGES = 1 << 17
ONE_BITS = np.uint32(0x3F800000)  # of 1.0 as float32; the bits of floats >= 0 are in the floats' order
COLUMNS = {"label": np.int32, "confidence": np.float32, "key_hash": np.uint64}

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Batch:
    """Predictions of consecutive images, from number `first_image` of all on.

    labels: int32 [n]; confidences: float32 [n] in [0, 1]; key_hashes: uint64 [n]. `keys(rows)` reads the keys of some
    rows of the batch from Parquet: few of them are needed, and strings are slow.
    """

    first_image: int
    labels: np.ndarray
    confidences: np.ndarray
    key_hashes: np.ndarray
    keys: Callable[[np.ndarray], pa.Array]

    def __len__(self) -> int:
        return len(self.labels)


class Predictions:
    """The files `predictions/...` of a label artifact; `scratch` is a folder for what memory shall not hold."""

    def __init__(self, store: Store, labels: Manifest, scratch: Path) -> None:
        self._store, self._labels = store, labels
        self.scratch = scratch
        self._files: Sequence[FileEntry] = labels.files_under("predictions/")
        self._starts = np.cumsum([0, *(entry.rows or 0 for entry in self._files)])
        self._copied = False
        self.class_names: list[str] = labels.metrics["class_names"]

    @property
    def num_images(self) -> int:
        """Rows of all files."""
        return int(self._starts[-1])

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes)."""
        return len(self.class_names)

    def scan(self, work: Callable[[Batch], Found]) -> Iterator[Found]:
        """What `work` makes of each batch, in the order of the images. Several run at once, in threads.

        The first time all files are read: raises StoreError on one that is damaged or holds what no prediction can be.
        """
        if not self._copied:
            self._copy_columns()
        return in_order(lambda first: work(self._block(first)), range(0, self.num_images, BLOCK_IMAGES))

    def _block(self, first: int) -> Batch:
        count = min(BLOCK_IMAGES, self.num_images - first)
        labels, confidences, key_hashes = (
            np.fromfile(self.scratch / name, form, count, offset=first * np.dtype(form).itemsize)
            for name, form in COLUMNS.items()
        )
        return Batch(first, labels, confidences, key_hashes, lambda rows: self._keys(first + rows))

    def _keys(self, images: np.ndarray) -> pa.Array:
        """The keys of images with rising numbers, at least one."""
        files = np.searchsorted(self._starts, images, side="right") - 1
        found = [
            read_rows(self._store, self._files[number], images[files == number] - self._starts[number], ["key"])["key"]
            for number in np.unique(files).tolist()
        ]
        return pa.chunked_array([chunk for column in found for chunk in column.chunks], pa.string()).combine_chunks()

    def _copy_columns(self) -> None:
        groups = ((entry, group) for entry in self._files for group in range(-(-(entry.rows or 0) // ROW_GROUP_ROWS)))
        paths = [self.scratch / name for name in COLUMNS]
        with paths[0].open("wb") as labels, paths[1].open("wb") as confidences, paths[2].open("wb") as key_hashes:
            for columns in in_order(self._read_group, groups):
                for stream, column in zip((labels, confidences, key_hashes), columns, strict=True):
                    column.tofile(stream)
        self._copied = True

    def _read_group(self, place: tuple[FileEntry, int]) -> list[np.ndarray]:
        entry, group = place
        with self._store.local_copy(entry) as path:
            try:
                with pq.ParquetFile(path) as reader:
                    table = reader.read_row_group(group, columns=list(COLUMNS), use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"{entry.path} cannot be read as predictions ({error})") from error
        columns = [table[name].to_numpy() for name in COLUMNS]
        self._check(entry, group, *columns[:2])
        return columns

    def _check(self, entry: FileEntry, group: int, labels: np.ndarray, confidences: np.ndarray) -> None:
        expected = min(ROW_GROUP_ROWS, (entry.rows or 0) - group * ROW_GROUP_ROWS)
        wrong = (labels < 0) | (labels >= self.num_classes) | (confidences.view(np.uint32) > ONE_BITS)
        if len(labels) != expected:
            problem = f"row group {group} has {len(labels):,} rows, not {expected:,}"
        elif wrong.any():
            row = int(np.argmax(wrong))
            problem = (
                f"row {group * ROW_GROUP_ROWS + row:,} has label {labels[row]} and confidence {confidences[row]}, beyond "
                f"[0, {self.num_classes}) and [0, 1]"
            )
        else:
            return
        raise StoreError(
            f"labels {self._labels.key}: {entry.path}: {problem}; verify the artifact or label again (--rerun label)"
        )


def in_order(work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """`work` on each item in threads, results in the items' order; at most `AHEAD` items are begun and not yet taken."""
    waiting: deque[Future[Found]] = deque()
    with ThreadPoolExecutor(TRANSFERS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
