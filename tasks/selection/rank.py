"""The n-th image of each class in a ranking, exactly, of any number of images, in little memory.

Radix selection: count the images of each class by the highest bits of their rank, see in which bucket the n-th lies,
count the images of that bucket by the next bits, and so on, until those left can be sorted in memory. Where the cut goes
through images of one rank, their keys decide; these are ordered by DuckDB, which spills what does not fit into memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.selection.scan import Batch, Predictions

RANK_BITS = 32
COUNTERS = 1 << 24  # of a counting pass: 128 MB, however many classes there are
MOST_CANDIDATES = 1 << 20  # so many are sorted in memory, without another counting pass
SORT_MEMORY = "768MB"
TIES = pa.schema([("label", pa.int32()), ("key", pa.string())])

# The images of a batch that take part in the ranking: their places in the batch, labels, and ranks int64 in [0, 2^32).
Competitors = Callable[[Batch], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Limit:
    """Of each class, where the ranking is cut: an image is within if its rank is below `rank`, int64 [classes].

    Where the cut goes through images of one rank, `last_key` [classes] is the last key of those within; else null.
    """

    rank: np.ndarray
    last_key: pa.Array

    @classmethod
    def at(cls, rank: np.ndarray) -> Self:
        """A limit that goes by rank alone."""
        return cls(rank, pa.nulls(len(rank), pa.string()))

    def within(self, labels: np.ndarray, ranks: np.ndarray, keys: Callable[[np.ndarray], pa.Array]) -> np.ndarray:
        """Whether images are within: bool [n]. `keys` is asked only for images on whose key it depends."""
        limits = self.rank[labels]
        found = ranks < limits
        if self.last_key.null_count < len(self.last_key):
            cuts_ties = self.last_key.is_valid().to_numpy(zero_copy_only=False)
            tied = np.flatnonzero((ranks == limits) & cuts_ties[labels])
            if len(tied):
                last = self.last_key.take(pa.array(labels[tied]))
                found[tied] = pc.less_equal(keys(tied), last).to_numpy(zero_copy_only=False)
        return found


def find_limits(
    predictions: Predictions,
    competitors: Competitors,
    competing: np.ndarray,
    wanted: np.ndarray,
    counters: int = COUNTERS,
    most_candidates: int = MOST_CANDIDATES,
) -> Limit:
    """Cut each class's ranking behind its first `wanted` images by (rank, key).

    competing, wanted: int64 [classes], how many compete and how many of them are to be within; 0 <= wanted <= competing.
    `competitors` gives none of a class of which none is wanted.
    The cut is exact, whatever `counters` and `most_candidates`, which bound memory, are.
    """
    search = _Search(competing, wanted)
    while search.depth < RANK_BITS and search.left.sum() > most_candidates:
        search.narrow(predictions, competitors, counters)
    if search.depth < RANK_BITS:
        search.sort(predictions, competitors)
    cut = np.flatnonzero(search.left > search.places)
    last_keys: list[str | None] = [None] * len(wanted)
    if len(cut):
        ties = search.write_ties(predictions, competitors, cut, predictions.scratch / "ties.parquet")
        for label, key in _nth_keys(ties, predictions.scratch / "spill", cut, search.places[cut]):
            last_keys[label] = key
    whole = (wanted > 0) & (search.left == search.places)
    return Limit(search.prefix + whole, pa.array(last_keys, pa.string()))


class _Search:
    """How far the rank of each class's n-th image is known: its highest `depth` bits are `prefix`, int64 [classes]."""

    def __init__(self, competing: np.ndarray, wanted: np.ndarray) -> None:
        self.asked = np.flatnonzero(wanted)  # classes with anything to find
        self.left = np.where(wanted > 0, competing, 0)  # images whose ranks begin as the n-th's
        self.places = wanted.astype(np.int64)  # of the n-th among these, from 1
        self.prefix = np.zeros(len(wanted), np.int64)
        self.depth = 0

    def narrow(self, predictions: Predictions, competitors: Competitors, counters: int) -> None:
        """One counting pass: learn the next bits."""
        asked = self.asked
        bits = min(RANK_BITS - self.depth, max(1, (counters // len(asked)).bit_length() - 1))
        slot = np.zeros(len(self.prefix), np.int64)
        slot[asked] = np.arange(len(asked))
        shift, mask = RANK_BITS - self.depth - bits, (1 << bits) - 1

        def buckets(batch: Batch) -> np.ndarray:
            _, labels, ranks = self._left_of(batch, competitors)
            return (slot[labels] << bits) | ((ranks >> shift) & mask)

        counts = np.zeros((len(asked), 1 << bits), np.int64)
        for found in predictions.scan(buckets):
            np.add.at(counts.reshape(-1), found, 1)
        np.cumsum(counts, axis=1, out=counts)
        digits = (counts < self.places[asked, None]).sum(axis=1)
        rows = np.arange(len(asked))
        before = np.where(digits > 0, counts[rows, digits - 1], 0)
        self._learn(asked, bits, digits, before, counts[rows, digits] - before)

    def sort(self, predictions: Predictions, competitors: Competitors) -> None:
        """Learn all bits, by sorting the images that are left."""
        found = list(predictions.scan(lambda batch: self._left_of(batch, competitors)[1:]))
        if not len(self.asked):
            return
        labels, ranks = (np.concatenate(columns) for columns in zip(*found, strict=True))
        keyed = np.sort((labels.astype(np.int64) << RANK_BITS) | ranks)
        starts = np.searchsorted(keyed, self.asked << RANK_BITS)
        nth = keyed[starts + self.places[self.asked] - 1]
        first, behind = np.searchsorted(keyed, nth), np.searchsorted(keyed, nth, side="right")
        bits = RANK_BITS - self.depth
        self._learn(self.asked, bits, nth & ((1 << bits) - 1), first - starts, behind - first)

    def write_ties(self, predictions: Predictions, competitors: Competitors, cut: np.ndarray, path: Path) -> Path:
        """Labels and keys of the images at the limits of the classes `cut`."""
        cuts = np.zeros(len(self.prefix), bool)
        cuts[cut] = True

        def ties(batch: Batch) -> pa.RecordBatch | None:
            rows, labels, _ = self._left_of(batch, competitors)
            tied = np.flatnonzero(cuts[labels])
            if not len(tied):
                return None
            return pa.RecordBatch.from_arrays([pa.array(labels[tied]), batch.keys(rows[tied])], schema=TIES)

        with pq.ParquetWriter(path, TIES) as writer:
            for found in predictions.scan(ties):
                if found is not None:
                    writer.write_batch(found)
        return path

    def _left_of(self, batch: Batch, competitors: Competitors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, labels, ranks = competitors(batch)
        if not self.depth:
            return rows, labels, ranks
        left = np.flatnonzero((ranks >> (RANK_BITS - self.depth)) == self.prefix[labels])
        return rows[left], labels[left], ranks[left]

    def _learn(self, classes: np.ndarray, bits: int, digits: np.ndarray, before: np.ndarray, left: np.ndarray) -> None:
        self.prefix[classes] = (self.prefix[classes] << bits) | digits
        self.places[classes] -= before
        self.left[classes] = left
        self.depth += bits


def _nth_keys(ties: Path, spill: Path, labels: np.ndarray, places: np.ndarray) -> list[tuple[int, str]]:
    """For each class the key at a place (from 1). DuckDB orders strings by their UTF-8 bytes, as Arrow compares them."""
    import duckdb

    query = """
        SELECT label, key
        FROM (
            SELECT label, key, row_number() OVER (PARTITION BY label ORDER BY key) AS place
            FROM read_parquet($ties, hive_partitioning = false)
        )
        JOIN (SELECT unnest($labels) AS label, unnest($places) AS place) USING (label, place)
    """
    values = {"ties": str(ties), "labels": labels.tolist(), "places": places.tolist()}
    with duckdb.connect(config={"memory_limit": SORT_MEMORY, "temp_directory": str(spill)}) as connection:
        return connection.execute(query, values).fetchall()
