"""Labeling of photographs, tars to Parquet, against what a user would pick instead: timm's own loops on the same device.

python -m benchmarks.labeling [--images 20000] [--peer-images 2000] [--repeats 3] [--photos ../shared/data/photos.parquet] [--compile always]

EfficientNet-Lite0 with ImageNet weights at 224 px, on the GPU where there is one, else on all cores. Each repeat runs, one
after the other: timm's inference loop with its defaults (eager, float32, Pillow in two workers) and with the best of its
flags (--channels-last, --amp with bfloat16, --torchcompile: all are tried first), the bare compiled frozen forward pass of
images that lie on the device (bfloat16 where the hardware computes in it), and the label stage from tars to a committed set of files, of all images and of half of them. Then what the
speed costs: agreement with eager float32 timm. Prints medians and ratios; fails where an aim, the agreement, the bound of
memory or the linear cost is not kept.
"""

import argparse
import hashlib
import io
import itertools
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
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
from models.compute import ComputeConfig, LocalEngine, num_gpus
from models.configs import LabelConfig
from models.precision import computes_in_bfloat16
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
SHARD_IMAGES = 500
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAGS = ("channels-last", "bfloat16", "compile")
BATCH = {"cpu": 50, "cuda": 256}[DEVICE]
AIMS = {"timm's defaults": 5.0, "timm's best flags": 1.7, "the bare forward pass": 0.8}
LEAST_AGREEMENT = 0.99  # of top-1 with eager float32 timm
MOST_MB = {"cpu": 1500, "cuda": 5000}[DEVICE]  # a process; with CUDA's libraries and pinned batches
MOST_BEND = 1.15  # seconds an image of all images over those of half of them, compiling left out


def write_data_set(
    store: Store, photos: list[bytes], count: int, name: str, split: str = "unlabeled", labels: Sequence[int] = (-1,)
) -> Manifest:
    """A data set whose split holds the photographs, and their labels, again and again, in shards of 500."""
    files: list[FileEntry] = []
    folder = artifact_folder("dataset", name)
    sizes = [Image.open(io.BytesIO(data)).size for data in photos]
    for shard in range(-(-count // SHARD_IMAGES)):
        numbers = range(shard * SHARD_IMAGES, min(count, (shard + 1) * SHARD_IMAGES))
        with store.staging() as staging:
            samples = (ShardSample(f"{n:08d}", {"jpg": photos[n % len(photos)]}) for n in numbers)
            places = write_tar(staging / "shard.tar", samples)
            rows = []
            for number, place in zip(numbers, places, strict=True):
                width, height = sizes[number % len(photos)]
                label = labels[number % len(labels)]
                facts = {"key": f"{number:08d}", "label": label, "width": width, "height": height, "source": "photos"}
                sha256 = hashlib.sha256(photos[number % len(photos)]).hexdigest()
                rows.append({**facts, "offset": place["jpg"][0], "bytes": place["jpg"][1], "sha256": sha256})
            write_parquet(staging / "index.parquet", pa.Table.from_pylist(rows, INDEX_SCHEMA))
            for kind, local in (("shards", "shard.tar"), ("index", "index.parquet")):
                logical = f"{kind}/{split}/{shard:05d}{Path(local).suffix}"
                files.append(publish_file(store, folder, logical, staging / local, len(rows)))
    return _commit(store, "dataset", name, files)


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

    def __init__(self, folder: Path, flags: tuple[str, ...] = ()) -> None:
        """`flags`: some of FLAGS, timm's --channels-last, --amp --amp-dtype bfloat16 and --torchcompile."""
        self._flags = flags
        model = lite0()
        config = resolve_data_config(model=model)
        names = ("input_size", "mean", "std", "interpolation", "crop_pct")
        self._loader = create_loader(
            create_dataset("", folder),
            batch_size=BATCH,
            is_training=False,
            num_workers=2,
            persistent_workers=True,
            device=torch.device(DEVICE),
            use_prefetcher=False,
            **{name: config[name] for name in names},
        )
        model = model.to(DEVICE)
        if "channels-last" in flags:
            model = model.to(memory_format=torch.channels_last)
        self._forward: Any = torch.compile(model) if "compile" in flags else model

    def run(self, count: int) -> None:
        """Predict at least `count` images."""
        done = 0
        with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled="bfloat16" in self._flags):
            while done < count:
                for images, _ in self._loader:
                    images = images.to(DEVICE)
                    if "channels-last" in self._flags:
                        images = images.contiguous(memory_format=torch.channels_last)
                    self._forward(images).softmax(-1).cpu()
                    done += len(images)


def best_of_timm(folder: Path) -> tuple[tuple[str, ...], Timm]:
    """The fastest combination of timm's flags, each tried for a moment: it hangs on network and processor."""
    flags = [name for name in FLAGS if name != "bfloat16" or computes_in_bfloat16(DEVICE)]  # emulated, it is far slower
    found = {}
    for count in range(len(flags) + 1):
        for some in itertools.combinations(flags, count):
            timm = Timm(folder, some)
            timm.run(2 * BATCH)
            found[some] = (rate(timm.run, 4 * BATCH), timm)
    print("timm's flags:", {" ".join(some) or "none": round(each, 1) for some, (each, _) in found.items()}, flush=True)
    best = max(found, key=lambda some: found[some][0])
    return best, found[best][1]


def bare_forward() -> Callable[[int], None]:
    """The compiled frozen forward pass of a batch that lies ready on the device, in bfloat16 where it computes in that."""
    from torch._inductor import config as inductor

    model = lite0().to(DEVICE).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE).contiguous(memory_format=torch.channels_last)
    forward = torch.compile(model)

    def run(count: int) -> None:
        with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=computes_in_bfloat16(DEVICE)):
            for _ in range(-(-count // BATCH)):
                logits = forward(images)
            logits.cpu()  # a GPU is waited for

    with inductor.patch(freezing=True):
        run(2 * BATCH)
    return run


def rate(run: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - started)


def agreement(store: Store, files: tuple[FileEntry, ...], photos: list[bytes], truth: list[int]) -> float:
    """The share of images of the same class as eager float32 timm with timm's own transform says; prints errors too."""
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
    print(f"confidence errs by {error.mean():.4f} in the mean, {error.max():.4f} at most")
    print(f"top-1 against the photographs' labels: ours {right:.1%}, timm {(expected.argmax(1) == truth).mean():.1%}")
    return float(same.mean())


class Repeats:
    """All competitors, one after the other in every repeat: rates in images a second, and seconds of ours by size."""

    def __init__(self, whole: Ours, half: Ours, peers: dict[str, Callable[[int], None]]) -> None:
        self._ours, self._peers = {"half": half, "all": whole}, peers  # of the last one the files are looked at
        self.rates: dict[str, list[float]] = {name: [] for name in (*peers, "ours", "ours, compiling left out")}
        self.seconds: dict[str, list[float]] = {"all": [], "half": []}  # compiling left out

    def run(self, images: int, peer_images: int) -> None:
        """One repeat."""
        for peer, run in self._peers.items():
            self.rates[peer].append(rate(run, peer_images))
        for size, ours in self._ours.items():
            seconds, compiling = ours.seconds()
            self.seconds[size].append(seconds - compiling)
            if size == "all":
                self.rates["ours"].append(images / seconds)
                self.rates["ours, compiling left out"].append(images / (seconds - compiling))
        print(f"repeat {len(self.seconds['all'])}:", {k: round(v[-1], 1) for k, v in self.rates.items()}, flush=True)

    def speed_is_kept(self) -> bool:
        """Print the medians and their ratios."""
        medians = {name: statistics.median(values) for name, values in self.rates.items()}
        for name, value in medians.items():
            print(f"{name}: {value:.1f} images/s")
        for peer, aim in AIMS.items():
            of_all, without = medians["ours"] / medians[peer], medians["ours, compiling left out"] / medians[peer]
            print(f"against {peer}: {of_all:.2f}, compiling left out {without:.2f} (aim {aim})")
        return all(medians["ours"] >= aim * medians[peer] for peer, aim in AIMS.items())

    def cost_is_linear(self, images: int, half: int) -> bool:
        """Print seconds an image at both sizes."""
        whole, part = (statistics.median(self.seconds[size]) for size in ("all", "half"))
        bend = whole / images / (part / half)
        print(
            f"{half:,} images in {part:.1f} s, {images:,} in {whole:.1f} s: an image costs {bend:.2f} as much (bound {MOST_BEND})"
        )
        return bend <= MOST_BEND


def main() -> None:
    """Print the figures; exit with an error that names what is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--images", type=int, default=20000, help="of each of our runs")
    parser.add_argument("--peer-images", type=int, default=2000, help="of each run of a peer, warm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--batch", type=int, default=0)
    options = parser.parse_args()
    table = pq.read_table(options.photos)
    photos, truth = [row["bytes"] for row in table["image"].to_pylist()], table["label"].to_pylist()
    half = options.images // 2
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        folder = Path(name) / "photos" / "all"
        folder.mkdir(parents=True)
        for number, data in enumerate(photos):
            (folder / f"{number:04d}.jpg").write_bytes(data)
        store = Store(f"{name}/store")
        model, compute = write_model(store), ComputeConfig(compile=options.compile, inference_batch=options.batch)
        ours, smaller = (
            Ours(store, write_data_set(store, photos, n, f"photos-{n}"), model, compute) for n in (options.images, half)
        )
        flags, best = best_of_timm(folder.parent)
        peers = {
            "timm's defaults": Timm(folder.parent).run,
            "timm's best flags": best.run,
            "the bare forward pass": bare_forward(),
        }
        for run in peers.values():
            run(4 * BATCH)  # warm: compiled, workers started
        smaller.seconds()
        repeats = Repeats(ours, smaller, peers)
        for _ in range(options.repeats):
            repeats.run(options.images, options.peer_images)
        print(f"{options.images:,} images on {DEVICE}, medians of {options.repeats}; numerics {ours.numerics}")
        print(f"timm's best flags: {' '.join(flags)}; bfloat16 in this hardware: {computes_in_bfloat16(DEVICE)}")
        kept = {"an aim of speed": repeats.speed_is_kept(), "linear cost": repeats.cost_is_linear(options.images, half)}
        processes = num_gpus() if DEVICE == "cuda" else LocalEngine(compute).processes
        peak, bound = ours.peak_bytes / 1e6, MOST_MB * processes
        print(f"peak memory of our {processes} processes together: {peak:,.0f} MB (bound {bound:,} MB)")
        agreeing = agreement(store, ours.files, photos, truth)
        print(f"top-1 agrees with eager float32 timm on {agreeing:.2%} of the images (aim {LEAST_AGREEMENT:.0%})")
        kept |= {"the bound of memory": 0 < peak <= bound, "agreement with timm": agreeing >= LEAST_AGREEMENT}
    missed = [what for what, is_kept in kept.items() if not is_kept]
    sys.exit(f"not kept: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
