"""One corrupted image: kind and severity in, pixels out."""

import hashlib

import numpy as np

from models.corruptions.kinds import KINDS
from models.corruptions.levels import LEVELS


def corrupt(pixels: np.ndarray, kind: str, severity: int, rng: np.random.Generator, table: str) -> np.ndarray:
    """A corrupted copy of uint8 [side, side, 3] pixels, of the same form.

    `kind` is one of KIND_NAMES, `severity` 1 to 5, `table` one of TABLES: `imagenet` (224 px) or `cifar` (32 px). Values are
    cut off, not rounded, as the benchmark stores them. Raises KeyError on another kind or table.
    """
    level = LEVELS[table][kind][severity - 1]
    made = KINDS[kind](pixels, level, rng)
    return made if made.dtype == np.uint8 else (np.clip(made, 0, 1) * 255).astype(np.uint8)


def noise_of(seed: int, kind: str, severity: int, key: str) -> np.random.Generator:
    """The generator of one corrupted image: the same for the same (seed, kind, severity, image key), on any machine."""
    digest = hashlib.sha256(f"{kind}/{severity}/{key}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:16], "big")])
