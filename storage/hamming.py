"""All pairs of 64-bit hashes that differ in few bits, without comparing all pairs.

Of two hashes that differ in `radius` bits, cut into pieces, some piece differs in at most `radius // pieces`
(Norouzi, Punjani, Fleet 2012, *Fast Search in Hamming Space with Multi-Index Hashing*). So each piece of a query is looked
up with all small changes in a table of that piece, and only what turns up there is compared.
"""

from itertools import combinations, pairwise
from math import comb

import numpy as np

BITS = 64
PIECES = (2, 3, 4, 5, 6, 8)
MOST_PIECE_BITS = 22  # a table has 4 bytes for each value of its piece
BLOCK_QUERIES = 64


class HammingIndex:
    """An immutable set of hashes, uint64 [n], searched for those within `radius` bits, 0..63.

    Memory: 8 bytes a hash for itself and 4 for each piece; the tables of the pieces take 2 to 32 MB together.
    """

    def __init__(self, hashes: np.ndarray, radius: int) -> None:
        self._hashes, self._radius = np.ascontiguousarray(hashes, np.uint64), radius
        self._tables = [_Table(self._hashes, *place) for place in cut(len(hashes), radius)]

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs within the radius, sorted: query numbers, hash numbers, differing bits, int64 [pairs] each."""
        found = [self._search(queries[at : at + BLOCK_QUERIES], at) for at in range(0, len(queries), BLOCK_QUERIES)]
        pairs = np.concatenate([np.empty((0, 3), np.int64), *found])
        return pairs[:, 0], pairs[:, 1], pairs[:, 2]

    def _search(self, queries: np.ndarray, first: int) -> np.ndarray:
        pairs = []
        for table in self._tables:
            rows, numbers = table.look_up(queries)
            bits = np.bitwise_count(queries[rows] ^ self._hashes[numbers])
            near = bits <= self._radius
            pairs.append(np.stack([rows[near] + first, numbers[near], bits[near]], axis=1))
        return np.unique(np.concatenate(pairs), axis=0)


class _Table:
    """The hashes by the value of some of their bits."""

    def __init__(self, hashes: np.ndarray, shift: int, bits: int, changes: int) -> None:
        self._shift, self._mask = np.uint64(shift), np.uint64((1 << bits) - 1)
        flips = [sum(1 << bit for bit in chosen) for k in range(changes + 1) for chosen in combinations(range(bits), k)]
        self._flips = np.array(flips, np.intp)
        values = self._values(hashes)
        self._order = np.argsort(values.astype(np.uint32)).astype(np.int32)
        self._starts = np.concatenate([[0], np.bincount(values, minlength=1 << bits).cumsum()]).astype(np.int32)

    def look_up(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs (query number, hash number) whose piece differs in few enough bits."""
        values = self._values(queries)[:, None] ^ self._flips
        starts = self._starts[values].ravel().astype(np.int64)
        counts = self._starts[values + 1].ravel() - starts
        rows = np.repeat(np.arange(len(queries)), counts.reshape(values.shape).sum(1))
        skipped = np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return rows, self._order[skipped + np.arange(len(skipped))].astype(np.int64)

    def _values(self, hashes: np.ndarray) -> np.ndarray:
        return ((hashes >> self._shift) & self._mask).astype(np.intp)


def cut(num_hashes: int, radius: int) -> list[tuple[int, int, int]]:
    """The cheapest pieces for that many hashes: each piece's lowest bit, its bits, and the changes to look up."""

    def cost(pieces: int) -> float:
        bits, changes = BITS / pieces, radius // pieces
        lookups = pieces * sum(comb(round(bits), k) for k in range(changes + 1))
        return lookups * (1 + num_hashes / 2**bits)

    pieces = min((p for p in PIECES if BITS / p <= MOST_PIECE_BITS), key=cost)
    edges = [BITS * piece // pieces for piece in range(pieces + 1)]
    return [(low, high - low, radius // pieces) for low, high in pairwise(edges)]
