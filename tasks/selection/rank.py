"""The n-th image of each class in a ranking, exactly, of any number of images, in little memory.

Radix selection: count the images of each class by the highest bits of their rank, see in which bucket the n-th lies,
count the images of that bucket by the next bits, and so on. What is left when the buckets are small (or are nothing but
ties) is ordered by rank and key in DuckDB, which spills to disk what does not fit into memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.selection.scan import Batch, Predictions

RANK_BITS = 63  # ranks are below 2^63, so that a limit above all of them is a uint64 still
COUNTERS = 1 << 24  # of a counting pass: 128 MB, however many classes there are
MOST_CANDIDATES = 1 << 20  # fewer are ordered at once, without another counting pass
SORT_MEMORY = "768MB"
CANDIDATES = pa.schema([("label", pa.int32()), ("rank", pa.uint64()), ("key", pa.string())])

# The images of a batch that take part in the ranking: their places in the batch, labels and ranks uint64.
Competitors = Callable[[Batch], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Limit:
    """Of each class, where the ranking is cut: an image is within if its rank is below `rank`, uint64 [classes].

    Where the cut goes through images of one rank, `last_key` [classes] is the last key of those within; else null.
    """

    rank: np.ndarray
    last_key: pa.Array

    def within(self, labels: np.ndarray, ranks: np.ndarray, keys: Callable[[np.ndarray], pa.Array]) -> np.ndarray:
        """Whether images are within: bool [n]. `keys` is asked only for images on whose key it depends."""
        limits = self.rank[labels]
        found = ranks < limits
        if self.last_key.null_count < len(self.last_key):
            tied = np.flatnonzero((ranks == limits) & self._cuts_ties[labels])
            if len(tied):
                last = self.last_key.take(pa.array(labels[tied]))
                found[tied] = pc.less_equal(keys(tied), last).to_numpy(zero_copy_only=False)
        return found

    @property
    def _cuts_ties(self) -> np.ndarray:
        return self.last_key.is_valid().to_numpy(zero_copy_only=False)


def find_limits(
    predictions: Predictions,
    competitors: Competitors,
    competing: np.ndarray,
    wanted: np.ndarray,
    scratch: Path,
    counters: int = COUNTERS,
    most_candidates: int = MOST_CANDIDATES,
) -> Limit:
    """Cut each class's ranking behind its first `wanted` images by (rank, key).

    competing, wanted: int64 [classes], how many compete and how many of them are to be within; 0 <= wanted <= competing.
    `scratch` is a folder for what does not fit into memory. The cut is exact, whatever `counters` and
    `most_candidates`, which bound memory, are.
    """
    search = _Search(np.flatnonzero(wanted), wanted, np.where(wanted > 0, competing, 0))
    left = int(search.left.sum())
    while left > most_candidates and search.depth < RANK_BITS:
        search.narrow(predictions, competitors, counters)
        before, left = left, int(search.left.sum())
        if left > before // 2:
            break  # nothing but ties, most likely: more bits tell them apart no better
    return search.order_rest(predictions, competitors, scratch)


class _Search:
    """How far the n-th image's rank is known: its highest `depth` bits, `prefix` uint64 [classes]."""

    def __init__(self, asked: np.ndarray, wanted: np.ndarray, competing: np.ndarray) -> None:
        self.asked = asked  # classes with anything to find
        self.places = wanted.astype(np.int64)  # of the n-th, counted from the beginning of its bucket
        self.left = competing.copy()  # images in that bucket
        self.depth = 0
        self.prefix = np.zeros(len(wanted), np.uint64)

    def narrow(self, predictions: Predictions, competitors: Competitors, counters: int) -> None:
        """One counting pass: learn the next bits."""
        asked = self.asked
        bits = min(RANK_BITS - self.depth, max(1, int(np.log2(max(2, counters // len(asked))))))
        slot = np.zeros(len(self.prefix), np.int64)
        slot[asked] = np.arange(len(asked))
        shift, mask = np.uint64(RANK_BITS - self.depth - bits), np.uint64((1 << bits) - 1)

        def buckets(batch: Batch) -> np.ndarray:
            _, labels, ranks = self._in_bucket(batch, competitors)
            return (slot[labels] << bits) | ((ranks >> shift) & mask).astype(np.int64)

        counts = np.zeros(len(asked) << bits, np.int64)
        for found in predictions.scan(buckets):
            np.add.at(counts, found, 1)
        running = counts.reshape(len(asked), -1)
        np.cumsum(running, axis=1, out=running)
        digits = (running < self.places[asked, None]).sum(axis=1)
        rows = np.arange(len(asked))
        before = np.where(digits > 0, running[rows, digits - 1], 0)
        self.left[asked] = running[rows, digits] - before
        self.places[asked] -= before
        self.prefix[asked] = (self.prefix[asked] << np.uint64(bits)) | digits.astype(np.uint64)
        self.depth += bits

    def order_rest(self, predictions: Predictions, competitors: Competitors, scratch: Path) -> Limit:
        """Order the images of the buckets by rank and key, and cut behind the n-th."""
        rank = np.zeros(len(self.prefix), np.uint64)
        last_key: list[str | None] = [None] * len(self.prefix)
        if not len(self.asked):
            return Limit(rank, pa.array(last_key, pa.string()))

        def candidates(batch: Batch) -> pa.RecordBatch:
            rows, labels, ranks = self._in_bucket(batch, competitors)
            keys = batch.keys(rows) if len(rows) else pa.array([], pa.string())
            return pa.RecordBatch.from_arrays([pa.array(labels), pa.array(ranks), keys], schema=CANDIDATES)

        path = scratch / "candidates.parquet"
        with pq.ParquetWriter(path, CANDIDATES) as writer:
            for found in predictions.scan(candidates):
                if found.num_rows:
                    writer.write_batch(found)
        for label, its_rank, key, tied in _nth_by_key(path, scratch, self.asked, self.places[self.asked]):
            rank[label] = its_rank if tied else its_rank + 1
            last_key[label] = key if tied else None
        path.unlink()
        return Limit(rank, pa.array(last_key, pa.string()))

    def _in_bucket(self, batch: Batch, competitors: Competitors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, labels, ranks = competitors(batch)
        if not self.depth:
            return rows, labels, ranks
        inside = np.flatnonzero((ranks >> np.uint64(RANK_BITS - self.depth)) == self.prefix[labels])
        return rows[inside], labels[inside], ranks[inside]


def _nth_by_key(
    candidates: Path, scratch: Path, labels: np.ndarray, places: np.ndarray
) -> list[tuple[int, int, str, bool]]:
    """For each class its image at a place (from 1): label, rank, key, and whether the next one has the same rank.

    DuckDB orders strings by their UTF-8 bytes, as Arrow compares them.
    """
    import duckdb

    query = """
        SELECT label, rank, key, tied
        FROM (
            SELECT label, rank, key, row_number() OVER ranking AS place, lead(rank) OVER ranking IS NOT DISTINCT FROM rank AS tied
            FROM read_parquet($candidates, hive_partitioning = false)
            WINDOW ranking AS (PARTITION BY label ORDER BY rank, key)
        )
        JOIN (SELECT unnest($labels) AS label, unnest($places) AS place) USING (label, place)
    """
    values = {"candidates": str(candidates), "labels": labels.tolist(), "places": places.tolist()}
    with duckdb.connect(config={"memory_limit": SORT_MEMORY, "temp_directory": str(scratch / "spill")}) as connection:
        return connection.execute(query, values).fetchall()
