"""Writing the balanced shards of a selection at three sizes: CPU seconds a copy, whether the cost is linear, peak memory.

python -m benchmarks.shard_writing [--images 50000 100000 200000] [--classes 1000] [--shard-images 1000] [--folder FOLDER]

A data set of tiny images in shards of `--shard-images`, label artifacts with all probabilities of `--classes` classes,
and a selection of every image once: each output shard has images of every input shard. The plan is made beforehand; what
is timed is `tasks.selection.shards:write_shards` in a process of its own, all output shards in one piece of work.
Fails where a copy costs more than 1.25 times as much CPU time at the largest size as at the smallest, or memory grows.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

MOST_BEND, MOST_MB = 1.25, 1500.0
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63600000000200"
    "0148afa4710000000049454e44ae426082"
)


def make_spec(folder: Path, images: int, classes: int, shard_images: int) -> dict[str, Any]:
    """A data set, its labels and a planned selection in a store; the spec of `write_shards`."""
    from models.predictions import predictions_table, probabilities_table
    from storage.artifacts import FileEntry, Manifest, artifact_folder, commit, publish_file
    from storage.objects import Store
    from storage.shards import INDEX_SCHEMA, ShardSample, write_parquet, write_tar
    from tasks.select import plan_selection
    from tasks.selection.config import SelectConfig

    store, names = Store(str(folder)), [f"class {n}" for n in range(classes)]
    files: dict[str, list[FileEntry]] = {"dataset": [], "labels": []}
    sha256 = hashlib.sha256(PNG).hexdigest()
    for number, first in enumerate(range(0, images, shard_images)):
        keys = [f"{n:010d}" for n in range(first, min(images, first + shard_images))]
        probabilities = np.random.default_rng(number).random((len(keys), classes), np.float32)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        with store.staging() as staging:
            places = write_tar(staging / "shards", (ShardSample(key, {"png": PNG}) for key in keys))
            facts = {"bytes": len(PNG), "sha256": sha256, "label": -1, "width": 1, "height": 1, "source": "made"}
            rows = [{"key": k, "offset": p["png"][0], **facts} for k, p in zip(keys, places, strict=True)]
            write_parquet(staging / "index", pa.Table.from_pylist(rows, INDEX_SCHEMA))
            write_parquet(staging / "predictions", predictions_table(keys, probabilities))
            write_parquet(staging / "probabilities", probabilities_table(probabilities))
            for kind, own in (("dataset", ("shards", "index")), ("labels", ("predictions", "probabilities"))):
                for name in own:
                    logical = f"{name}/unlabeled/{number:05d}.{'tar' if name == 'shards' else 'parquet'}"
                    entry = publish_file(store, artifact_folder(kind, "a"), logical, staging / name, len(keys))
                    files[kind].append(entry)
    facts = {"stage": "made", "stage_version": 1, "config": {}, "metrics": {"class_names": names}}
    inputs = {"dataset": {}, "labels": {"model": "m", "data": "a"}}
    made = {
        kind: commit(store, Manifest(kind=kind, key="a", inputs=inputs[kind], files=tuple(files[kind]), **facts))
        for kind in files
    }
    config = SelectConfig(min_confidence=0, balance=False, shard_images=shard_images, on_empty_class="skip")
    layout = [f for f in plan_selection(store, "s", config, made["labels"]).files if f.name.startswith("layout/")]
    return {
        "store": store.url, "shard_images": shard_images, "data": "a", "labels": "a",
        "layout": {str(n): entry.model_dump() for n, entry in enumerate(layout)},
        "parts": {str(n): f"part{n}" for n in range(-(-images // shard_images))},
    }  # fmt: skip


def write(spec: dict[str, Any]) -> dict[str, float]:
    """Write the shards in this process."""
    from models.worker import Worker
    from tasks.selection.shards import write_shards

    started, cpu = time.perf_counter(), time.process_time()
    write_shards(spec, Worker())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "peak_mb": peak}


def main() -> None:
    """Print the figures; exit with an error where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shard-images", type=int, default=1000)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(write(json.loads(Path(options.child).read_text()))))
        return
    costs, peaks = [], []
    for images in options.images:
        with tempfile.TemporaryDirectory(prefix="nst-bench-", dir=options.folder) as name:
            spec = make_spec(Path(name) / "store", images, options.classes, options.shard_images)
            (Path(name) / "spec.json").write_text(json.dumps(spec))
            line = [sys.executable, "-m", "benchmarks.shard_writing", "--child", f"{name}/spec.json"]
            done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"writing failed: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])  # behind the progress
        costs.append(found["cpu"] / images)
        peaks.append(found["peak_mb"])
        print(
            f"{images:,} copies of {len(spec['parts'])} input shards: {found['seconds']:.1f} s, {found['cpu']:.1f} s of CPU "
            f"time, {1e6 * costs[-1]:.0f} us a copy, peak memory {peaks[-1]:.0f} MB",
            flush=True,
        )
    bend = costs[-1] / costs[0]
    print(f"CPU time a copy, largest over smallest: {bend:.2f} (bound {MOST_BEND}); memory bound {MOST_MB:.0f} MB")
    sys.exit(0 if bend < MOST_BEND and max(peaks) < MOST_MB else "not kept: linear cost within the bound of memory")


if __name__ == "__main__":
    main()
