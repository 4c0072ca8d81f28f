"""Copies on their way from the order of the input to that of the output, through local disk.

Every output shard has images of almost every input shard. So the input is read once, shard after shard, and what is
chosen of it is spilled by group of output shards; then one group after the other is brought into its order in memory.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

SPILL_BYTES = 64 << 20  # of soft labels that wait, so that a group's files are few and large
PLACE, SOFT = "place", "soft"


class Scatter:
    """Rows in any order in, groups of consecutive places out. `folder` holds them meanwhile.

    A row has a place (from 0 on, each once), facts (a row of a table) and a soft label.
    """

    def __init__(self, folder: Path, group_rows: int, num_classes: int, spill_bytes: int = SPILL_BYTES) -> None:
        self._folder, self._group_rows = folder, group_rows
        self._num_classes, self._spill_bytes = num_classes, spill_bytes
        self._waiting: list[pa.Table] = []
        self._num_pieces = self._num_rows = self._waiting_rows = 0

    def add(self, places: np.ndarray, facts: pa.Table, soft_labels: np.ndarray) -> None:
        """Take n rows: places int64 [n]; facts, always of one schema; soft labels float16 [n, classes]."""
        soft = pa.FixedSizeListArray.from_arrays(pa.array(soft_labels.reshape(-1)), self._num_classes)
        self._waiting.append(facts.append_column(PLACE, pa.array(places)).append_column(SOFT, soft))
        self._waiting_rows += len(places)
        if self._waiting_rows * 2 * self._num_classes >= self._spill_bytes:
            self._spill()

    def groups(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Facts and soft labels of each group in the order of their places; a group's files are deleted behind it."""
        self._spill()
        for start in range(0, self._num_rows, self._group_rows):
            count = min(self._group_rows, self._num_rows - start)
            soft_labels = np.empty((count, self._num_classes), np.float16)
            facts, places = [], []
            for path in sorted(self._folder_of(start // self._group_rows).iterdir()):
                with pa.OSFile(str(path)) as stream:
                    table = pa.ipc.open_file(stream).read_all()
                path.unlink()
                places.append(table[PLACE].to_numpy() - start)
                soft = table[SOFT].combine_chunks().flatten()
                soft_labels[places[-1]] = np.asarray(soft).reshape(-1, self._num_classes)
                facts.append(table.drop_columns([PLACE, SOFT]))
            order = np.empty(count, np.int64)
            order[np.concatenate(places)] = np.arange(count)
            yield pa.concat_tables(facts).take(pa.array(order)), soft_labels

    def _spill(self) -> None:
        """Write the waiting rows, one file a group that has any of them."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        groups = table[PLACE].to_numpy() // self._group_rows
        order = np.argsort(groups, kind="stable")
        table = table.take(pa.array(order))
        found, starts = np.unique(groups[order], return_index=True)
        for group, start, stop in zip(found.tolist(), starts, [*starts[1:], len(table)], strict=True):
            folder = self._folder_of(group)
            folder.mkdir(exist_ok=True)
            place = folder / f"{self._num_pieces:06d}.arrow"
            with pa.OSFile(str(place), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
                writer.write_table(table.slice(start, stop - start))
        self._num_rows += len(table)
        self._num_pieces += 1
        self._waiting, self._waiting_rows = [], 0

    def _folder_of(self, group: int) -> Path:
        return self._folder / f"group-{group}"
