"""Chance as a function of (seed, key): the same on every machine, in every order, for every cut into files.

Each use of chance has a stream of its own, so that for example the images that are duplicated are not those that come
first in the shards.
"""

import numpy as np

LUCK, SUBSET, ORDER = 1, 2, 3  # streams: never renumber
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(values: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit numbers: uint64 [n] -> uint64 [n]."""
    mixed = values + np.uint64(_GOLDEN)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_MIX_1)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_MIX_2)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def draw(key_hashes: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """A uniform number of each key, uint64 [n]; seed in [0, 2^63)."""
    of_stream = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64(stream))
    return splitmix64(key_hashes ^ of_stream)
