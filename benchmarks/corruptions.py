"""A corruption suite of photographs against labeling as many of them: is it as fast as the labeling engine?

    .venv/bin/python -m benchmarks.corruptions [--photos ../shared/data/photos.parquet] [--repeats 3] [--images 50]

EfficientNet-Lite0 with ImageNet weights at 224 px, on all cores. In each repeat, one after the other: evaluate-corrupted, all
fifteen kinds at five severities of some photographs; the same with one process instead of one a core; labeling as many images as the
suite has pictures; and the corruptions alone, in this process, of a few photographs: what a picture costs besides reading
and predicting it. Compiling is a part of all of it, as it is for a user. Then the suite once more with a kind added: only
that kind is made. Prints medians and ratios, and the seconds of a thousand pictures by kind.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from benchmarks.labeling import PHOTOS, Ours, write_data_set, write_model
from models.compute import ComputeConfig, LocalEngine
from models.corruptions.apply import corrupt, noise_of
from models.corruptions.levels import KIND_NAMES, SEVERITIES
from storage.artifacts import Manifest
from storage.keys import digest
from storage.objects import Store
from tasks.contract import StageContext
from tasks.evaluators.corrupted import CorruptedConfig, evaluate

SIDE = 224
DIRECT_PHOTOS = 4  # of the corruptions alone


class Suite:
    """evaluate-corrupted on a store, from nothing each time unless `keep`."""

    def __init__(self, store: Store, data: Manifest, model: Manifest, compute: ComputeConfig) -> None:
        self._store, self._inputs, self._compute = store, {"data": data, "model": model}, compute

    def seconds(self, kinds: tuple[str, ...] = KIND_NAMES, keep: bool = False) -> float:
        """Of the whole stage."""
        if not keep:
            for path in self._store.paths("parts/robustness"):
                self._store.delete(path)
        engine = LocalEngine(self._compute, lambda line: None)
        context = StageContext(self._store, digest(time.time_ns()), engine, self._compute)
        started = time.perf_counter()
        result = evaluate(context, CorruptedConfig(kinds=kinds), self._inputs)
        assert set(result.metrics["errors"]) == set(kinds)
        return time.perf_counter() - started


def direct_seconds(photos: list[bytes]) -> dict[str, float]:
    """Seconds of one picture of each kind, over all severities, one thread."""
    pictures = [np.asarray(ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (SIDE, SIDE))) for data in photos]
    found = {}
    for kind in KIND_NAMES:
        started = time.perf_counter()
        for number, picture in enumerate(pictures):
            for severity in SEVERITIES:
                corrupt(picture, kind, severity, noise_of(0, kind, severity, str(number)), "imagenet")
        found[kind] = (time.perf_counter() - started) / len(pictures) / len(SEVERITIES)
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=50)
    options = parser.parse_args()
    table = pq.read_table(options.photos)
    photos, labels = [row["bytes"] for row in table["image"].to_pylist()], table["label"].to_pylist()
    pictures = options.images * len(KIND_NAMES) * len(SEVERITIES)
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        store = Store(f"{name}/store")
        model, both, single = write_model(store), ComputeConfig(), ComputeConfig(processes=1)
        tested = write_data_set(store, photos, options.images, "tested", "test", labels)
        whole, alone = Suite(store, tested, model, both), Suite(store, tested, model, single)
        labeling = Ours(store, write_data_set(store, photos, pictures, "labeled"), model, both)
        labeling.seconds()  # warm: the files are in memory, the network has been compiled once
        rates: dict[str, list[float]] = {"suite": [], "suite, one process": [], "labeling": []}
        for _ in range(options.repeats):
            rates["suite"].append(pictures / whole.seconds())
            rates["suite, one process"].append(pictures / alone.seconds())
            rates["labeling"].append(pictures / labeling.seconds()[0])
        direct = direct_seconds(photos[:DIRECT_PHOTOS])
        whole.seconds(KIND_NAMES[:-1])
        last = whole.seconds(KIND_NAMES, keep=True)
    median = {what: statistics.median(values) for what, values in rates.items()}
    for what, values in rates.items():
        print(f"{what}: {median[what]:.1f} pictures/s ({min(values):.1f}-{max(values):.1f})")
    print(f"suite against labeling: {median['suite'] / median['labeling']:.2f}")
    print(f"processes against one: {median['suite'] / median['suite, one process']:.2f}")
    ideal = 1 / (1 / median["labeling"] + statistics.mean(direct.values()) / LocalEngine(both).processes)
    print(f"suite against labeling with the corruptions' own arithmetic on every core: {median['suite'] / ideal:.2f}")
    print("seconds of 1,000 pictures, one core: " + ", ".join(f"{k} {1000 * s:.0f}" for k, s in direct.items()))
    print(f"a fifteenth kind added to fourteen: {last:.1f} s, the whole suite {pictures / median['suite']:.1f} s")


if __name__ == "__main__":
    main()
