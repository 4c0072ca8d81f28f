"""Transfers against raw s3fs on the same real server, in turns: streaming a shard to verified samples, and upload.

python -m benchmarks.s3_throughput [--mib 1024] [--repeats 5]

Ours: the shard is streamed to samples, each cut out by the index and checked (as labeling reads it); "cached": it comes
whole through an empty cache, is checked, kept on disk, then each sample is read and checked again (as the first epoch of
a training reads it; later ones make no request). Raw s3fs: `open(...)` with its best block size, read to the end,
nothing cut, checked or kept; for upload `put_file`. Every timing is a process of its own, which also reports its peak
memory. Prints medians and ratios.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deployments.seaweedfs import BUCKET, s3_server

SAMPLE_BYTES = 110_000  # an ImageNet JPEG
URL = f"s3://{BUCKET}/bench"
LEAST_RATIO, MOST_MB = 0.8, 300


def make_shard(path: Path, mib: int) -> list[list[object]]:
    """A tar of random images, and its index: offset, size, sha256 of each."""
    from storage.shards import ShardSample, write_tar

    block = os.urandom(SAMPLE_BYTES + 4096)
    places: list[list[object]] = []

    def samples():  # type: ignore[no-untyped-def]
        for number in range(mib * 1024 * 1024 // SAMPLE_BYTES):
            data = number.to_bytes(8, "big") + block[number % 4096 :][:SAMPLE_BYTES]
            places.append([0, len(data), hashlib.sha256(data).hexdigest()])
            yield ShardSample(f"{number:08d}", {"jpg": data})

    for place, at in zip(places, write_tar(path, samples()), strict=True):
        place[0] = at["jpg"][0]
    return places


def read_ours(folder: Path, whole: bool = False) -> int:
    from storage.artifacts import FileEntry
    from storage.objects import Store
    from storage.shards import ShardReader

    entry = FileEntry.model_validate_json((folder / "entry.json").read_text())
    index = json.loads((folder / "index.json").read_text())
    store = Store(URL)
    store.exists("warm-up")  # the connection, as the other side has it
    started = time.perf_counter()
    reader = ShardReader(store, [entry], whole)
    total = sum(len(data) for data in reader.stream(entry.path, index))
    return report(started, total)


def read_cached(folder: Path) -> int:
    return read_ours(folder, whole=True)


def read_raw(folder: Path) -> int:
    import s3fs

    entry = json.loads((folder / "entry.json").read_text())
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    fs.exists(f"{BUCKET}/bench/warm-up")
    started, total = time.perf_counter(), 0
    with fs.open(f"{BUCKET}/bench/{entry['path']}", "rb", block_size=int(os.environ["RAW_BLOCK"])) as stream:
        while block := stream.read(1 << 20):
            total += len(block)
    return report(started, total)


def write_ours(folder: Path) -> int:
    from storage.objects import Store

    copy = folder / "copy.tar"
    os.link(folder / "shard.tar", copy)
    store = Store(URL)
    store.exists("warm-up")
    started = time.perf_counter()
    size = copy.stat().st_size
    store.put_file(copy, f"up/ours-{time.time_ns()}.tar")
    return report(started, size)


def write_raw(folder: Path) -> int:
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False)
    fs.exists(f"{BUCKET}/bench/warm-up")
    started = time.perf_counter()
    fs.put_file(str(folder / "shard.tar"), f"{BUCKET}/bench/up/raw-{time.time_ns()}.tar")
    return report(started, (folder / "shard.tar").stat().st_size)


def report(started: float, size: int) -> int:
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # getrusage's figure begins with that of the parent
    peak_mb = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e6  # type: ignore[index]
    print(json.dumps({"mb_per_s": size / 1e6 / seconds, "peak_mb": peak_mb}))
    return 0


ROLES = {
    "read_ours": read_ours,
    "read_cached": read_cached,
    "read_raw": read_raw,
    "write_ours": write_ours,
    "write_raw": write_raw,
}


def run(role: str, folder: Path, raw_block: int = 0) -> dict[str, float]:
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {**os.environ, "NST_CACHE_DIR": str(cache), "RAW_BLOCK": str(raw_block)}
    line = [sys.executable, "-m", "benchmarks.s3_throughput", "--role", role, "--folder", str(folder)]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(folder: Path, repeats: int) -> bool:
    """Both sides in turns; whether the promises hold."""
    blocks = {block: run("read_raw", folder, block << 20)["mb_per_s"] for block in (5, 16, 50)}
    best = max(blocks, key=lambda block: blocks[block])
    results: dict[str, list[dict[str, float]]] = {role: [] for role in ROLES}
    for _ in range(repeats):
        for role in ROLES:
            results[role].append(run(role, folder, best << 20))
    kept = True
    cached = statistics.median(r["mb_per_s"] for r in results["read_cached"])
    print(f"read through the cache: {cached:.0f} MB/s, peak {max(r['peak_mb'] for r in results['read_cached']):.0f} MB")
    for way in ("read", "write"):
        rate = {s: statistics.median(r["mb_per_s"] for r in results[f"{way}_{s}"]) for s in ("ours", "raw")}
        ratios = [
            a["mb_per_s"] / b["mb_per_s"] for a, b in zip(results[f"{way}_ours"], results[f"{way}_raw"], strict=True)
        ]
        peak = {s: max(r["peak_mb"] for r in results[f"{way}_{s}"]) for s in ("ours", "raw")}
        ratio = statistics.median(ratios)
        print(
            f"{way}: ours {rate['ours']:.0f} MB/s, peak {peak['ours']:.0f} MB; raw s3fs {rate['raw']:.0f} MB/s "
            f"(block {best} MiB), peak {peak['raw']:.0f} MB; ratio {ratio:.2f} (of {[round(r, 2) for r in ratios]})"
        )
        kept = kept and ratio >= LEAST_RATIO and peak["ours"] < MOST_MB
    return kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--role", choices=ROLES)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.role:
        sys.exit(ROLES[arguments.role](arguments.folder))
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name:
        folder = Path(name)
        with s3_server(folder / "server") as server:
            server.adopt()
            from storage.artifacts import FileEntry
            from storage.keys import file_sha256
            from storage.objects import Store

            index = make_shard(folder / "shard.tar", arguments.mib)
            size, sha256 = (folder / "shard.tar").stat().st_size, file_sha256(folder / "shard.tar")
            entry = FileEntry(name="shards/x.tar", path="shards/x.tar", bytes=size, sha256=sha256)
            (folder / "index.json").write_text(json.dumps(index))
            (folder / "entry.json").write_text(entry.model_dump_json())
            shutil.copyfile(folder / "shard.tar", folder / "upload.tar")
            Store(URL).put_file(folder / "upload.tar", entry.path)
            kept = compare(folder, arguments.repeats)
    sys.exit(0 if kept else f"not kept: ratio of at least {LEAST_RATIO}, peak below {MOST_MB} MB")


if __name__ == "__main__":
    main()
