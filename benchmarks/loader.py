"""Loading for training alone: photographs from tars to batches of noised views, against webdataset and timm's loader.

python -m benchmarks.loader [--size 224] [--batch 50] [--pairs 5] [--seconds 15] [--photos ../shared/data/photos.parquet]

Nothing is trained: every batch is thrown away. Each pair runs, one after the other, each in a process of its own with as
many loader processes as there are cores: our loader; `webdataset` on the very same tars, decoded by Pillow, with
torchvision's crop, flip and RandAugment; and timm's loader on the same photographs as files. All crop at random, flip and
run two operations of RandAugment of magnitude 9 on every image (timm with p1.0 for that). No image is decoded twice by a
cache: the photographs lie there 15 times over. Prints images a second and core, spread and ratios pair by pair; fails
where ours is slower than a peer.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.training import PHOTOS, prepare, spec, write_data
from models.compute import num_cores
from models.launch import run_worker

WARM_BATCHES = 6  # those that every loader process makes ahead while the first ones start
OURS = "ours"
AIM = 1.0


def timed(batches: Iterable[Any], batch: int, seconds: float) -> dict[str, float]:
    """Images a second past the first batches."""
    begun, count = 0.0, 0
    for number, _ in enumerate(batches):
        if number == WARM_BATCHES:
            begun = time.perf_counter()
        elif number > WARM_BATCHES:
            count += batch
            if time.perf_counter() - begun > seconds:
                break
    return {"rate": count / (time.perf_counter() - begun)}


def our_loader(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: the loader of a teacher's training."""
    import torch

    from models.configs import TrainConfig
    from models.loader import IndexedImages, TrainingBatches, training_loader
    from storage.artifacts import get
    from storage.objects import Store

    torch.set_num_threads(1)
    store, config = Store(job["store"]), TrainConfig.model_validate(job["config"])
    labeled = IndexedImages(store, get(store, "dataset", job["dataset"]), "labeled")
    batches = TrainingBatches(config, labeled, None, None, range(config.replicas))
    return timed(training_loader(batches, 0, 10**6, job["workers"]), config.labeled_batch, job["seconds"])


def webdataset_loader(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: webdataset, Pillow and torchvision."""
    import torch
    import webdataset as wds
    from torchvision import transforms

    torch.set_num_threads(1)
    noise = transforms.Compose(
        [
            transforms.RandomResizedCrop(job["size"], interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(num_ops=2, magnitude=9),
            transforms.PILToTensor(),
        ]
    )
    data = (
        wds.WebDataset(job["tars"], resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .decode("pilrgb")
    )
    data = data.to_tuple("jpg").map_tuple(noise).batched(job["batch"], partial=False)
    loader = wds.WebLoader(data, batch_size=None, num_workers=job["workers"], prefetch_factor=4)
    return timed(loader, job["batch"], job["seconds"])


def timm_loader(job: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: timm's loader on class folders."""
    import torch
    from timm.data import create_dataset, create_loader

    torch.set_num_threads(1)
    loader = create_loader(
        create_dataset("", job["folder"]), batch_size=job["batch"], is_training=True, input_size=(3, job["size"], job["size"]),
        auto_augment="rand-m9-n2-p1.0", interpolation="bicubic", re_prob=0.0, color_jitter=None, num_workers=job["workers"],
        persistent_workers=True, use_prefetcher=False, device=torch.device("cpu"),
    )  # fmt: skip
    return timed((batch for _ in range(10**6) for batch in loader), job["batch"], job["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--model", default="efficientnet_b0", help=argparse.SUPPRESS)  # loaded by none
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="that each run is timed")
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        folder = Path(name)
        write_data(folder, options.photos)
        dataset = prepare(folder)
        shared = {"workers": num_cores(), "size": options.size, "batch": options.batch, "seconds": options.seconds}
        jobs: dict[str, tuple[str, dict[str, Any]]] = {
            OURS: ("our_loader", {**spec(options, folder, dataset, None, 1, 1), **shared}),
            "webdataset and Pillow": ("webdataset_loader", {**shared, "tars": _tars(folder, dataset)}),
            "timm's loader": ("timm_loader", {**shared, "folder": str(folder / "timm")}),
        }
        rates: dict[str, list[float]] = {name: [] for name in jobs}
        for number in range(options.pairs):
            for name, (function, job) in jobs.items():
                found = run_worker(f"benchmarks.loader:{function}", job, world=1, threads=1, on_log=lambda line: None)
                rates[name].append(found["rate"] / num_cores())
            print(f"pair {number + 1}:", {name: round(values[-1], 1) for name, values in rates.items()}, flush=True)
    _report(options, rates)


def _tars(folder: Path, dataset: str) -> list[str]:
    from storage.artifacts import get
    from storage.objects import Store
    from storage.shards import shard_files

    manifest = get(Store(str(folder / "store")), "dataset", dataset)
    return [str(folder / "store" / entry.path) for entry in shard_files(manifest, "labeled")]


def _report(options: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    print(f"{options.size} px, batch {options.batch}, {num_cores()} loader processes, medians of {options.pairs}")
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} images/s/core ({min(values):.0f}-{max(values):.0f})")
    missed = []
    for name in [name for name in rates if name != OURS]:
        ratios = [a / b for a, b in zip(rates[OURS], rates[name], strict=True)]
        median = statistics.median(ratios)
        print(f"ours against {name}: {median:.2f} ({min(ratios):.2f}-{max(ratios):.2f}), aim {AIM}")
        missed += [name] if median < AIM else []
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
