"""The bookkeeping of labeling 30,000 shards: pieces, parts and the labels' manifest, on a real server, without the labeling.

python -m benchmarks.many_tasks [--shards 30000] [--shards-a-piece 16] [--processes 2]

Each piece is a child process, as in a run, that publishes what a labeled shard leaves: two files (tiny: the numbers count)
and the marker that makes it a part. Then what a run does with them: after a failure find what is left to do, at the end
commit the labels (every file's size is checked) and open them. Prints seconds and rates.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.seaweedfs import BUCKET, s3_server

STAGE = "predict"
FILES = ("predictions.parquet", "probabilities.parquet")
PIECE = "benchmarks.many_tasks:label_nothing"


def label_nothing(spec: dict[str, Any], worker: Any) -> dict[str, Any]:
    """Worker function: publish the parts of some shards."""
    from storage.artifacts import publish_part
    from storage.objects import Store

    store = Store(spec["store"])
    for done, key in enumerate(spec["keys"], start=1):
        with store.staging() as folder:
            for name in FILES:
                (folder / name).write_bytes(key.encode())
            publish_part(store, STAGE, key, {}, {name: (folder / name, 10_000) for name in FILES})
        worker.progress(done, len(spec["keys"]), "shards", last=done == len(spec["keys"]))
    return {}


def manifest_of(parts: list[Any]) -> Any:
    """The labels that the parts are."""
    from storage.artifacts import Manifest

    files = [
        entry.model_copy(update={"name": f"{Path(entry.name).stem}/unlabeled/{number:05d}.parquet"})
        for number, part in enumerate(parts)
        for entry in part.files
    ]
    facts: dict[str, Any] = {"stage": "label", "stage_version": 1, "config": {}, "inputs": {}}
    return Manifest(kind="labels", key="big", files=tuple(files), **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=30_000)
    parser.add_argument("--shards-a-piece", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nst-bench-") as name, s3_server(Path(name)) as server:
        server.adopt()
        from models.compute import ComputeConfig, LocalEngine
        from storage.artifacts import commit, find_parts, get, made_parts
        from storage.keys import digest
        from storage.objects import Store

        url = f"s3://{BUCKET}/tasks"
        store, keys, size = Store(url), [digest(n) for n in range(options.shards)], options.shards_a_piece
        specs = [{"store": url, "keys": keys[start : start + size]} for start in range(0, len(keys), size)]

        def timed(what: str, step: Callable[[], Any], count: int, unit: str) -> Any:
            started = time.perf_counter()
            result = step()
            seconds = time.perf_counter() - started
            print(f"{what}: {seconds:.1f} s, {count / seconds:,.0f} {unit}/s", flush=True)
            return result

        engine = LocalEngine(ComputeConfig(processes=options.processes))
        half = len(specs) // 2
        timed(f"{half:,} pieces", lambda: engine.map(PIECE, specs[:half], lambda p: None), half, "pieces")
        found = timed("what is left, after a failure", lambda: find_parts(store, STAGE, keys, {}), len(keys), "shards")
        left = sum(part is None for part in found.values())
        assert left == len(keys) - half * size, left
        timed(
            f"the other {len(specs) - half:,} pieces",
            lambda: engine.map(PIECE, specs[half:], lambda p: None),
            len(specs) - half,
            "pieces",
        )
        found = timed("what is there", lambda: find_parts(store, STAGE, keys, {}), len(keys), "shards")
        labels = manifest_of(made_parts(STAGE, found, keys))
        timed("commit the labels", lambda: commit(store, labels), len(labels.files), "files")
        opened = timed("open them", lambda: get(store, "labels", "big"), len(labels.files), "files")
        assert len(opened.files) == 2 * options.shards


if __name__ == "__main__":
    main()
