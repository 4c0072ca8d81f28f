"""Unlabeled photographs in tars, registered in place and guarded, beside a plain loop that only decodes them.

python -m benchmarks.ingest_scale [--images 4000 16000] [--photos ../shared/data/photos.parquet]

For each size: seconds of the stage `unlabeled` on all cores (read, decode, hash, perceptual hash, thumbnails, leak guard
against 200 validation images, duplicates) and of webdataset with Pillow in as many workers; the peak memory of our
largest child; the bytes that were written for the bytes that were registered. Cost must be linear: it exits with an error
where an image costs over 1.3 times as much at the largest size as at the smallest.
"""

import argparse
import contextlib
import io
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import psutil
import pyarrow.parquet as pq

from models.compute import ComputeConfig, LocalEngine, num_cores
from storage.objects import Store
from tasks.contract import StageContext
from tests.datasets import prepare_all
from tests.real_images import write_images

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos.parquet"
TAR_IMAGES = 1000
MOST_LINEAR = 1.3


def write_crawl(root: Path, photos: list[bytes], images: int) -> int:
    """Tars of a thousand photographs, again and again, each with other bytes at its end; returns their bytes."""
    total = 0
    for number in range(-(-images // TAR_IMAGES)):
        path = root / f"crawl/{number:05d}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for n in range(number * TAR_IMAGES, min(images, (number + 1) * TAR_IMAGES)):
                data = photos[n % len(photos)] + n.to_bytes(4, "big")
                info = tarfile.TarInfo(f"{n:09d}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        total += path.stat().st_size
    return total


class PeakOfChildren:
    """The largest resident memory that any child of this process had, looked at ten times a second."""

    def __enter__(self) -> Self:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.bytes = max(self.bytes, child.memory_info().rss)


def ours(root: Path, folder: Path) -> dict[str, Any]:
    """The stages, in real children."""
    store, compute = Store(str(folder)), ComputeConfig()
    context = StageContext(store, "b", LocalEngine(compute), compute)
    with PeakOfChildren() as peak:
        started = time.perf_counter()
        result = prepare_all(context, root, unlabeled="crawl", leaks={"enabled": True})
        seconds = time.perf_counter() - started
    written = sum(info.bytes for info in store.infos("parts"))
    return {"seconds": seconds, "peak": peak.bytes, "written": written, **result.metrics["unlabeled"]}


def peer(root: Path) -> float:
    """webdataset's own reading, decoded by Pillow, in as many workers as there are cores."""
    import webdataset
    from torch.utils.data import DataLoader

    urls = [str(path) for path in sorted((root / "crawl").glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).decode("pil")
    started = time.perf_counter()
    for _ in DataLoader(data.map(_size), batch_size=None, num_workers=num_cores()):
        pass
    return time.perf_counter() - started


def _size(sample: dict[str, Any]) -> tuple[int, int]:
    size: tuple[int, int] = sample["jpg"].size
    return size


def main() -> int:
    """Run the sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[4000, 16000])
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    options = parser.parse_args()
    photos = [row["bytes"] for row in pq.read_table(options.photos)["image"].to_pylist()]
    costs = []
    for images in options.images:
        with tempfile.TemporaryDirectory(prefix="nst-ingest-") as folder:
            root = Path(folder) / "images"
            for split in ("labeled", "val", "test"):
                write_images(root / f"{split}.parquet", photos[:100], [n % 2 for n in range(100)])
            size = write_crawl(root, photos, images)
            plain = peer(root)
            found = ours(root, Path(folder) / "store")
            costs.append(found["seconds"] / images)
            print(
                f"{images:,} photographs, {size / 1e6:,.0f} MB on {num_cores()} cores: ours {found['seconds']:.1f} s "
                f"({images / found['seconds']:.0f} img/s), webdataset with Pillow, decoding only, {plain:.1f} s, ratio "
                f"{found['seconds'] / plain:.2f}; largest child {found['peak'] / 1e6:.0f} MB; {found['written'] / 1e6:.1f} MB "
                f"written; {found['leaked']:,} leaked, {found['duplicates']:,} duplicates",
                flush=True,
            )
    growth = costs[-1] / costs[0]
    print(f"an image costs {growth:.2f} times as much at the largest size as at the smallest")
    return int(growth > MOST_LINEAR)


if __name__ == "__main__":
    sys.exit(main())
