"""The order of samples: a pure function of (seed, stream, epoch), whatever the ranks, workers or restarts.

Shards are shuffled, then samples within a block of consecutive shuffled shards, so that a data set that fits no cache
is read shard by shard and still well mixed.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

LABELED_STREAM, UNLABELED_STREAM = 1, 2  # parts of the seed: never renumber
BLOCKS_IN_MEMORY = 4


def sample_rng(seed: int, stream: int, position: int) -> np.random.Generator:
    """The generator of one sample's noise: depends on the sample's position in its stream alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, position))))


class SampleOrder:
    """Maps a position in the endless stream of samples to a row of the index.

    `shard_rows` are the row counts of the shards in the index's order; every epoch visits each row once.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, stream: int, block_shards: int) -> None:
        self._starts = np.concatenate([[0], np.cumsum(shard_rows)]).astype(np.int64)
        self._seed, self._stream, self._block_shards = seed, stream, block_shards
        self._shards: OrderedDict[int, np.ndarray] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, position: int, count: int) -> np.ndarray:
        """The rows of `count` samples from `position` on, int64 [count]; goes on into the next epoch."""
        found = []
        while count:
            epoch, within = divmod(position, len(self))
            block, offset = self._block_at(epoch, within)
            piece = block[offset : offset + count]
            found.append(piece)
            position += len(piece)
            count -= len(piece)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _block_at(self, epoch: int, within: int) -> tuple[np.ndarray, int]:
        """The shuffled rows of the block that holds position `within` of the epoch, and the offset in it."""
        shards = _remember(self._shards, epoch, lambda: self._rng(epoch, 0).permutation(len(self._starts) - 1))
        sizes = (self._starts[1:] - self._starts[:-1])[shards]
        ends = np.cumsum(sizes)
        number = int(np.searchsorted(ends, within, side="right")) // self._block_shards
        first = number * self._block_shards
        start = int(ends[first - 1]) if first else 0

        def shuffle() -> np.ndarray:
            members = shards[first : first + self._block_shards]
            rows = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in members])
            return self._rng(epoch, 1 + number).permutation(rows)

        return _remember(self._blocks, (epoch, number), shuffle), within - start

    def _rng(self, epoch: int, part: int) -> np.random.Generator:
        seed = np.random.SeedSequence((self._seed, self._stream, epoch, part))
        return np.random.Generator(np.random.PCG64(seed))


def _remember(cache: OrderedDict, key: object, make: object) -> np.ndarray:
    if key not in cache:
        cache[key] = make()  # type: ignore[operator]
        if len(cache) > BLOCKS_IN_MEMORY:
            cache.popitem(last=False)
    return cache[key]
