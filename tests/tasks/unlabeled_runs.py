"""What the tests of the stage unlabeled share: its runs in this process, and what they read."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.compute import ComputeConfig, Engine
from storage.artifacts import Manifest, commit
from storage.objects import Store
from tasks.contract import StageContext, StageResult
from tests.datasets import HereEngine, prepare_all


def photograph(seed: int, side: int = 96) -> Image.Image:
    """A picture with detail of its own at every scale: two of them are never alike."""
    rng, pixels = np.random.default_rng(seed), np.zeros((side, side, 3))
    for cells in (3, 6, 12, 24):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), float) / 4
    return Image.fromarray(pixels.astype(np.uint8))


def run(store: Store, root: Path | str, engine: Engine | None = None, **fields: Any) -> StageResult:
    compute = ComputeConfig(processes=2, task_images=1)
    context = StageContext(store, "u1", engine or HereEngine(), compute)
    return prepare_all(context, root, **{"shard_images": 10, **fields})


def committed(store: Store, result: StageResult) -> Manifest:
    return commit(
        store,
        Manifest(
            kind="dataset",
            key="u1",
            stage="unlabeled",
            stage_version=1,
            config={},
            inputs={},
            files=result.files,
            metrics=result.metrics,
        ),
    )


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
