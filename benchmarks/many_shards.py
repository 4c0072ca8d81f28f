"""A bucket with 30,000 shards: how long until it is known what is there, and until its data set is open.

python -m benchmarks.many_shards [--shards 30000]

Fills a real server with the parts of that many shards (tar, index, rejects, marker: tiny, the numbers count), then times
each thing that a run does with them, and beside it s3fs's way of asking for one file after another, on a sample. Prints
seconds, objects a second, peak memory, ratios.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.seaweedfs import BUCKET, s3_server

SAMPLE = 300
MOST_S = 90.0
FILES = ("shard.tar", "index.parquet", "rejects.parquet")


def fill(store: Any, count: int) -> list[Any]:
    """Make the parts, many at once; returns them."""
    from storage.artifacts import FileEntry, Part, part_folder
    from storage.keys import digest
    from storage.objects import sealed

    parts, objects = [], {}
    for number in range(count):
        key = digest(number)
        entries = []
        for name in FILES:
            path = f"{part_folder('prepare', key)}/{name.replace('.', f'-{number:016x}.')}"
            entries.append(FileEntry(name=name, path=path, bytes=4, sha256=f"{number:064x}", rows=10_000))
            objects[path] = b"data"
        part = Part(stage="prepare", key=key, numerics={}, files=tuple(entries), facts={"rejects": []})
        objects[f"{part_folder('prepare', key)}/{digest({})[:16]}.json"] = sealed(part)
        parts.append(part)
    backend = store._backend

    async def put(s3: Any, path: str) -> None:
        await s3.put_object(Bucket=BUCKET, Key=backend._key(path), Body=objects[path])

    backend._gather(list(objects), put)
    return parts


def manifest_of(parts: list[Any]) -> Any:
    from storage.artifacts import Manifest

    files = []
    for number, part in enumerate(parts):
        for entry, folder in zip(part.files, ("shards", "index", "rejects"), strict=True):
            name = f"{folder}/unlabeled/{number:05d}{Path(entry.name).suffix}"
            files.append(entry.model_copy(update={"name": name}))
    return Manifest(
        kind="dataset", key="big", stage="prepare", stage_version=1, config={}, inputs={}, files=tuple(files)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=30_000)
    count = parser.parse_args().shards
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name, s3_server(Path(name)) as server:
        server.adopt()
        import s3fs

        from storage.artifacts import commit, find_parts, get
        from storage.objects import Store
        from storage.shards import shard_files

        store = Store(f"s3://{BUCKET}/many")
        started = time.perf_counter()
        parts = fill(store, count)
        print(f"filled with {4 * count:,} objects in {time.perf_counter() - started:.0f} s", flush=True)
        manifest, keys = manifest_of(parts), [part.key for part in parts]
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        paths = [f"{BUCKET}/many/{entry.path}" for part in parts[: SAMPLE // 3] for entry in part.files]
        steps: list[tuple[str, Callable[[], Any], int]] = [
            ("list all objects", lambda: store.infos("parts"), 4 * count),
            (
                "find the finished parts (sizes and markers)",
                lambda: find_parts(store, "prepare", keys, {}),
                4 * count,
            ),
            ("commit the data set (every file checked)", lambda: commit(store, manifest), 3 * count),
            (
                "open it (manifest read and checked)",
                lambda: shard_files(get(store, "dataset", "big"), "unlabeled"),
                3 * count,
            ),
        ]
        total = 0.0
        for label, ours, objects in steps:
            started = time.perf_counter()
            ours()
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            for path in paths:
                fs.info(path)
            one_by_one = (time.perf_counter() - started) / len(paths) * objects
            total += seconds
            print(
                f"{label}: {seconds:.1f} s, {objects / seconds:,.0f} objects/s; asked one by one with s3fs (sample of "
                f"{len(paths)}): {one_by_one:.0f} s, ratio {one_by_one / seconds:.0f}",
                flush=True,
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        print(f"all together {total:.1f} s, peak memory {peak:.0f} MB")
        sys.exit(0 if total < MOST_S else f"not kept: all of it within {MOST_S:.0f} s")


if __name__ == "__main__":
    main()
