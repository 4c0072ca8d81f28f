"""The predictions of a label artifact in passes: row group after row group, in order, read and computed in parallel.

Passes are cheap (about 5 s for 100 million rows) and need no memory; so the selection makes several.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import FileEntry, Manifest
from storage.errors import StoreError
from storage.objects import TRANSFERS, Store
from storage.shards import ROW_GROUP_ROWS

AHEAD = 2 * TRANSFERS  # results that may wait for an earlier one
ONE_BITS = np.uint32(0x3F800000)  # of 1.0 as float32; the bits of floats >= 0 are in the floats' order

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Batch:
    """Predictions of consecutive images, from number `first_image` of all on.

    labels: int32 [n]; confidences: float32 [n] in [0, 1]; key_hashes: uint64 [n]. `keys(rows)` reads the keys of some
    rows of the batch: strings are as slow to read as all else together, and few of them are needed.
    """

    first_image: int
    labels: np.ndarray
    confidences: np.ndarray
    key_hashes: np.ndarray
    keys: Callable[[np.ndarray], pa.Array]

    def __len__(self) -> int:
        return len(self.labels)


class Predictions:
    """The files `predictions/...` of a label artifact, and the number of its classes."""

    def __init__(self, store: Store, labels: Manifest) -> None:
        self._store, self._labels = store, labels
        self.files: Sequence[FileEntry] = labels.files_under("predictions/")
        self.class_names: list[str] = labels.metrics["class_names"]
        self._starts = np.cumsum([0, *(entry.rows or 0 for entry in self.files)])

    @property
    def num_images(self) -> int:
        """Rows of all files."""
        return int(self._starts[-1])

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes)."""
        return len(self.class_names)

    def scan(self, work: Callable[[Batch], Found]) -> Iterator[Found]:
        """What `work` makes of each batch, in the order of the rows. Several run at once, in threads.

        Raises StoreError on a file that is damaged or holds what no prediction can be.
        """

        def on_group(place: tuple[int, int]) -> Found:
            return self._on_group(*place, work)

        groups = (
            (number, group)
            for number, entry in enumerate(self.files)
            for group in range(-(-(entry.rows or 0) // ROW_GROUP_ROWS))
        )
        return in_order(on_group, groups)

    def _on_group(self, number: int, group: int, work: Callable[[Batch], Found]) -> Found:
        entry = self.files[number]
        with self._store.local_copy(entry) as path:
            try:
                with pq.ParquetFile(path) as reader:
                    columns = ["label", "confidence", "key_hash"]
                    table = reader.read_row_group(group, columns=columns, use_threads=False)
                    labels, confidences, key_hashes = (table[name].to_numpy() for name in columns)
                    self._check(entry, group, labels, confidences)

                    def keys(rows: np.ndarray) -> pa.Array:
                        column = reader.read_row_group(group, columns=["key"], use_threads=False)["key"]
                        return column.combine_chunks().take(pa.array(rows, pa.int64()))

                    first = int(self._starts[number]) + group * ROW_GROUP_ROWS
                    return work(Batch(first, labels, confidences, key_hashes, keys))
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"{entry.path} cannot be read as predictions ({error})") from error

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
