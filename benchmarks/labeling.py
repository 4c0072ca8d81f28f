"""Labeling of photographs on a CPU, tars to Parquet, against what a user would pick instead: timm's own loops.

python -m benchmarks.labeling [--images 5000] [--repeats 3] [--photos ../shared/data/photos.parquet] [--compile always]

EfficientNet-Lite0 with ImageNet weights at 224 px. Each repeat runs, one after the other on all cores: timm's inference
loop with its defaults (eager, float32, Pillow in two workers) and with its best flags (--channels-last, --amp with
bfloat16, --torchcompile), the bare compiled frozen bfloat16 forward pass without data, and the label stage from tars to
a committed set of files. Then what the speed costs: agreement with eager float32 timm. Prints medians and ratios.
"""

import argparse
import hashlib
import io
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config

from models import zoo
from models.compute import ComputeConfig, LocalEngine
from models.configs import LabelConfig
from models.predictions import read_predictions
from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file
from storage.keys import digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardSample, write_parquet, write_tar
from tasks.contract import StageContext
from tasks.label import label
from tests.lite0 import CONFIG, lite0

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos.parquet"
CLASSES = [f"class {number}" for number in range(1000)]
SHARD_IMAGES = 1000
BATCH = 50
AIMS = {"timm's defaults": 5.0, "timm's best flags": 1.7, "the bare forward pass": 0.8}


def write_data_set(store: Store, photos: list[bytes], count: int) -> Manifest:
    """A data set whose unlabeled split holds the photographs again and again, in shards of a thousand."""
    files: list[FileEntry] = []
    folder = artifact_folder("dataset", "photos")
    sizes = [Image.open(io.BytesIO(data)).size for data in photos]
    for shard in range(-(-count // SHARD_IMAGES)):
        numbers = range(shard * SHARD_IMAGES, min(count, (shard + 1) * SHARD_IMAGES))
        with store.staging() as staging:
            samples = (ShardSample(f"{n:08d}", {"jpg": photos[n % len(photos)]}) for n in numbers)
            places = write_tar(staging / "shard.tar", samples)
            rows = []
            for number, place in zip(numbers, places, strict=True):
                width, height = sizes[number % len(photos)]
                facts = {"key": f"{number:08d}", "label": -1, "width": width, "height": height, "source": "photos"}
                sha256 = hashlib.sha256(photos[number % len(photos)]).hexdigest()
                rows.append({**facts, "offset": place["jpg"][0], "bytes": place["jpg"][1], "sha256": sha256})
            write_parquet(staging / "index.parquet", pa.Table.from_pylist(rows, INDEX_SCHEMA))
            for name, local in (("shards", "shard.tar"), ("index", "index.parquet")):
                logical = f"{name}/unlabeled/{shard:05d}{Path(local).suffix}"
                files.append(publish_file(store, folder, logical, staging / local, len(rows)))
    return _commit(store, "dataset", "photos", files)


def write_model(store: Store) -> Manifest:
    with store.staging() as staging:
        zoo.save(lite0(), CONFIG, CLASSES, staging)
        files = [
            publish_file(store, artifact_folder("model", "lite0"), name, staging / name)
            for name in (zoo.WEIGHTS_FILE, zoo.CONFIG_FILE)
        ]
    return _commit(store, "model", "lite0", files)


def _commit(store: Store, kind: str, key: str, files: list[FileEntry]) -> Manifest:
    facts = {"stage": kind, "stage_version": 1, "config": {}, "inputs": {}, "metrics": {"class_names": CLASSES}}
    return commit(store, Manifest(kind=kind, key=key, files=tuple(files), **facts))


class Ours:
    """The label stage on a store, from nothing each time."""

    def __init__(self, store: Store, data: Manifest, model: Manifest, compute: ComputeConfig) -> None:
        self._store, self._inputs, self._compute = store, {"data": data, "model": model}, compute
        self.log: list[str] = []
        self.numerics: dict[str, Any] = {}
        self.files: tuple[FileEntry, ...] = ()
        self.peak_bytes = 0

    def seconds(self) -> tuple[float, float]:
        """Of a whole stage, and of them those in which the network was compiled."""
        assert self._store.root is not None
        shutil.rmtree(self._store.root / "parts", ignore_errors=True)
        self.log.clear()
        context = StageContext(
            self._store, digest(time.time_ns()), LocalEngine(self._compute, self.log.append), self._compute
        )
        with _peak_memory(self):
            started = time.perf_counter()
            result = label(context, LabelConfig(), self._inputs)
            seconds = time.perf_counter() - started
        self.files, self.numerics = result.files, result.facts["numerics"]
        compiling = [float(found[1]) for line in self.log if (found := re.match(r"compiled in ([\d.]+) s", line))]
        return seconds, max(compiling, default=0.0)


class _peak_memory:
    """Follows the proportional memory of this process's children, summed, once a second."""

    def __init__(self, ours: Ours) -> None:
        self._ours, self._done = ours, threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._follow, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _follow(self) -> None:
        while not self._done.wait(1.0):
            total = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    total += child.memory_full_info().pss if "warm" in " ".join(child.cmdline()) else 0
                except psutil.Error:
                    continue
            self._ours.peak_bytes = max(self._ours.peak_bytes, total)


class Timm:
    """timm's `inference.py`, its loader and its loop, on a folder of the photographs."""

    def __init__(self, folder: Path, best: bool) -> None:
        self._best = best
        model = lite0()
        config = resolve_data_config(model=model)
        names = ("input_size", "mean", "std", "interpolation", "crop_pct")
        self._loader = create_loader(
            create_dataset("", folder),
            batch_size=BATCH,
            is_training=False,
            num_workers=2,
            persistent_workers=True,
            device=torch.device("cpu"),
            use_prefetcher=False,
            **{name: config[name] for name in names},
        )
        if best:
            model = model.to(memory_format=torch.channels_last)
        self._forward: Any = torch.compile(model) if best else model

    def run(self, count: int) -> None:
        """Predict at least `count` images."""
        done = 0
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._best):
            while done < count:
                for images, _ in self._loader:
                    if self._best:
                        images = images.contiguous(memory_format=torch.channels_last)
                    self._forward(images).softmax(-1)
                    done += len(images)


def bare_forward() -> Callable[[int], None]:
    """The compiled frozen bfloat16 forward pass of a batch that lies ready."""
    from torch._inductor import config as inductor

    model = lite0().to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    forward = torch.compile(model)

    def run(count: int) -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(-(-count // BATCH)):
                forward(images)

    with inductor.patch(freezing=True):
        run(2 * BATCH)
    return run


def rate(run: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - started)


def agreement(store: Store, files: tuple[FileEntry, ...], photos: list[bytes], truth: list[int]) -> Iterator[str]:
    """Against eager float32 timm with timm's own transform."""
    model = lite0()
    transform = create_transform(**resolve_data_config(model=model), is_training=False)
    with torch.inference_mode():
        inputs = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in photos]
        expected = torch.cat([model(image[None]) for image in inputs]).softmax(-1).numpy()
    manifest = Manifest(kind="labels", key="", stage="label", stage_version=1, config={}, inputs={}, files=files)
    table = read_predictions(store, manifest)
    places = np.arange(len(table)) % len(photos)
    same = table["label"].to_numpy() == expected.argmax(axis=1)[places]
    error = np.abs(table["confidence"].to_numpy() - expected.max(axis=1)[places])
    right = (table["label"].to_numpy() == np.array(truth)[places]).mean()
    yield f"top-1 agrees with eager float32 timm on {same.mean():.2%} of {len(table):,} images (aim 99 %)"
    yield f"confidence errs by {error.mean():.4f} in the mean, {error.max():.4f} at most"
    yield f"top-1 against the photographs' labels: ours {right:.1%}, timm {(expected.argmax(1) == truth).mean():.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--images", type=int, default=5000, help="of each of our runs")
    parser.add_argument("--peer-images", type=int, default=0, help="of each run of a peer; 0: as many as ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--batch", type=int, default=0)
    options = parser.parse_args()
    table = pq.read_table(options.photos)
    photos, truth = [row["bytes"] for row in table["image"].to_pylist()], table["label"].to_pylist()
    peer_images = options.peer_images or options.images
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        folder = Path(name) / "photos" / "all"
        folder.mkdir(parents=True)
        for number, data in enumerate(photos):
            (folder / f"{number:04d}.jpg").write_bytes(data)
        store = Store(f"{name}/store")
        compute = ComputeConfig(compile=options.compile, inference_batch=options.batch)
        ours = Ours(store, write_data_set(store, photos, options.images), write_model(store), compute)
        peers = {
            "timm's defaults": Timm(folder.parent, best=False).run,
            "timm's best flags": Timm(folder.parent, best=True).run,
            "the bare forward pass": bare_forward(),
        }
        for run in peers.values():
            run(4 * BATCH)  # warm: compiled, workers started
        ours.seconds()
        rates: dict[str, list[float]] = {name: [] for name in (*peers, "ours", "ours, compiling left out")}
        for number in range(options.repeats):
            for peer, run in peers.items():
                rates[peer].append(rate(run, peer_images))
            seconds, compiling = ours.seconds()
            rates["ours"].append(options.images / seconds)
            rates["ours, compiling left out"].append(options.images / (seconds - compiling))
            print(
                f"repeat {number + 1}:", {k: round(v[-1], 1) for k, v in rates.items()}, f"compiling {compiling:.1f} s"
            )
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(f"{options.images:,} images, medians of {options.repeats}; numerics {ours.numerics}")
        for name, value in medians.items():
            print(f"{name}: {value:.1f} images/s")
        for peer, aim in AIMS.items():
            of_all, without = medians["ours"] / medians[peer], medians["ours, compiling left out"] / medians[peer]
            print(f"against {peer}: {of_all:.2f}, compiling left out {without:.2f} (aim {aim})")
        print(f"peak memory of all our processes: {ours.peak_bytes / 1e6:,.0f} MB")
        for line in agreement(store, ours.files, photos, truth):
            print(line)
    sys.exit(0 if all(medians["ours"] >= aim * medians[peer] for peer, aim in AIMS.items()) else "an aim was missed")


if __name__ == "__main__":
    main()
