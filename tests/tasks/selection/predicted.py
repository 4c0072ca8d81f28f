"""Predictions for the tests of selection: a label artifact of given rows; and the selection's rules in plain Python."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.predictions import PREDICTIONS_SCHEMA, key_hashes
from storage.artifacts import Manifest, publish_file
from storage.objects import Store
from storage.shards import write_parquet
from tasks.selection.config import SelectConfig
from tasks.selection.scan import Predictions

NAMES = ("cat", "dog", "owl")
Row = tuple[str, int, float]  # key, label, confidence
Fate = tuple[str, int]  # decision, copies
MASK = (1 << 64) - 1


def publish_predictions(store: Store, files: Sequence[Sequence[Row]], names: Sequence[str] = NAMES) -> Manifest:
    """A label artifact (not committed) with these prediction files."""
    entries = []
    for number, rows in enumerate(files):
        keys = [key for key, _, _ in rows]
        columns = [
            pa.array(keys, pa.string()),
            pa.array(key_hashes(keys)),
            pa.array([label for _, label, _ in rows], pa.int32()),
            pa.array(np.array([confidence for _, _, confidence in rows], np.float32)),
        ]
        with store.staging() as folder:
            write_parquet(folder / "p.parquet", pa.Table.from_arrays(columns, schema=PREDICTIONS_SCHEMA))
            name = f"predictions/unlabeled/{number:05d}.parquet"
            entries.append(publish_file(store, "artifacts/labels/l1", name, folder / "p.parquet", len(rows)))
    metrics: dict[str, Any] = {"class_names": list(names)}
    return Manifest(
        kind="labels",
        key="l1",
        stage="label",
        stage_version=1,
        config={},
        inputs={},
        files=tuple(entries),
        metrics=metrics,
    )


def predicted(folder: Path, files: Sequence[Sequence[Row]], names: Sequence[str] = NAMES) -> Predictions:
    """The predictions of these files, in a store of their own."""
    store = Store(str(folder / "store"))
    return Predictions(store, publish_predictions(store, files, names), folder)


def splitmix(value: int) -> int:
    """The published C code, with Python's integers."""
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chance(key: str, seed: int, stream: int) -> int:
    """The 64-bit number that a key draws."""
    key_hash = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return splitmix(key_hash ^ splitmix(splitmix(seed) ^ stream))


def luck(key: str, seed: int) -> int:
    """What decides over copies, below 2^32."""
    return chance(key, seed, 1) >> 32


def expected_fates(rows: Sequence[Row], config: SelectConfig) -> dict[str, Fate]:
    """The rules in plain Python: key -> decision and copies. Every image is looked at, every class is sorted."""
    least = np.float32(config.min_confidence)
    most = np.float32(np.inf if config.max_confidence is None else config.max_confidence)
    fates: dict[str, Fate] = {}
    for label in {label for _, label, _ in rows}:
        own = [(key, np.float32(confidence)) for key, of, confidence in rows if of == label]
        passing = [(key, c) for key, c in own if least <= c < most]
        if not passing and config.on_empty_class == "best":
            passing = [(key, c) for key, c in own if c < least]
        for key, confidence in own:
            fates[key] = ("below_confidence" if confidence < least else "above_confidence", 0)
        fates |= _balanced(passing, config)
    for key, (decision, _) in fates.items():
        if decision == "kept" and config.subset < 1 and chance(key, config.seed, 2) >= config.subset * 2**64:
            fates[key] = ("not_in_subset", 0)
    return fates


def _balanced(passing: list[tuple[str, np.float32]], config: SelectConfig) -> dict[str, Fate]:
    cap = config.images_per_class
    if not config.balance:
        return {key: ("kept", 1) for key, _ in passing}
    if config.method == "reference":
        grid = [np.float32(step / 100) for step in range(101)]
        tried = [t for t in reversed(grid) if np.float32(config.min_confidence) < t]
        enough = [t for t in tried if sum(c >= t for _, c in passing) >= cap]
        threshold = enough[0] if enough else np.float32(config.min_confidence)
        above = {key for key, c in passing if c >= threshold}
        fates = {key: ("over_cap", 0) for key, _ in passing}
        for key in above:
            whole, part = divmod(cap, len(above))
            copies = whole + (luck(key, config.seed) < (part << 32) // len(above))
            fates[key] = ("kept", copies) if copies else ("not_drawn", 0)
        return fates
    ranked = [key for key, _ in sorted(passing, key=lambda image: (-image[1], image[0]))]
    fates = dict.fromkeys(ranked[cap:], ("over_cap", 0))
    kept = sorted(ranked[:cap], key=lambda key: (luck(key, config.seed), key))
    return fates | {key: ("kept", cap // len(kept) + (n < cap % len(kept))) for n, key in enumerate(kept)}
