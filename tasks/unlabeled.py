"""unlabeled: the images whose labels nobody knows -> shards (or tars of others, registered where they lie), guarded.

Validation and test images that hide among them are left out: of the index, which is what says what the data set holds.
A shard is made once, whatever the evaluation images are; guarding it reads its hashes and thumbnails only.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from models.compute import group_shards
from models.worker import Stopped, Worker
from storage.artifacts import (
    FileEntry,
    Manifest,
    Part,
    artifact_folder,
    find_part,
    find_parts,
    made_parts,
    publish_file,
    publish_part,
)
from storage.errors import UserError
from storage.keys import digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, TableWriter, read_batches, read_table, read_tables, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.ingest import (
    DataConfig,
    ingest,
    name_files,
    open_source,
    plan_stretches,
)
from tasks.leaks.index import LEAKS_SCHEMA, Leak, LeakConfig, LeakIndex, evaluation_table
from tasks.leaks.phash import SIDE
from tasks.reject_limit import check_rejects
from tasks.source_parts import NO_NUMERICS, SourceShard, shards_of

VERSION = 2  # 2: torn tars are told, copied ones cut, folders cut by names; leaks at distance 0 are the same bytes
GUARD = "guard"
GUARD_VERSION = (
    2  # 2: torn tars are told, copied ones cut, folders cut by names; leaks at distance 0 are the same bytes
)
SPLIT = "unlabeled"
LEAKS_FILE = "leaks.parquet"
EVALUATION_SPLITS = ("val", "test")
BATCH_ROWS = 4096  # of a shard in memory at once; divides the row groups, so that index and thumbnails keep step
BUCKET_IMAGES, MOST_BUCKET_BITS = 1 << 22, 8


class UnlabeledConfig(DataConfig):
    """The data settings, of which the unlabeled images depend on these."""

    not_in_key: ClassVar[tuple[str, ...]] = (
        *DataConfig.not_in_key,
        *("labeled", "val", "test", "label_column", "class_names", "min_images_per_class", "seed"),
    )


def unlabeled(context: StageContext, config: UnlabeledConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Make the data set of unlabeled images, without those of `inputs["data"]`'s validation and test sets.

    Raises UserError on missing files, on too many rejects, and where no image is left.
    """
    source, data = open_source(config), inputs["data"]
    stretches = plan_stretches(config, source.files([SPLIT]))
    parts = ingest(context, config, stretches)
    shards = [
        shard
        for stretch, part in zip(stretches, parts, strict=True)
        for shard in shards_of(part, source.location(stretch.file) if stretch.in_place else "")
    ]
    counts = check_rejects(config.max_reject_fraction, SPLIT, parts)
    guarded = guard(context, config.leaks, data, shards) if config.leaks.enabled else []
    kept = [next((entry for entry in part.files if entry.name == "index.parquet"), None) for part in guarded]
    indices = [own or shard.index for own, shard in zip_longest(kept, shards)]
    rejects = [part.file("rejects.parquet") for part in parts]
    files = name_files(SPLIT, list(zip([shard.tar for shard in shards], indices, strict=True)), rejects)
    leaked = [shard.tar for shard, own in zip(shards, kept, strict=False) if own is not None and not own.rows]
    files += [tar.model_copy(update={"name": f"leaked/{number:05d}.tar"}) for number, tar in enumerate(leaked)]
    names = {entry.path: entry.name for entry in files}
    leaks = _all_leaks(context.store, [names.get(shard.tar.path, "") for shard in shards], guarded)
    if leaks.num_rows == counts["images"]:
        raise UserError(
            f"data.unlabeled={config.unlabeled!r}: no image is left: {leaks.num_rows} are copies of validation or test images"
            f" and {counts['rejected']} cannot be decoded; point it at other images, or set data.leaks.enabled=false"
        )
    with context.store.staging() as folder:
        write_parquet(folder / LEAKS_FILE, leaks)
        place = artifact_folder("dataset", context.key)
        files.append(publish_file(context.store, place, LEAKS_FILE, folder / LEAKS_FILE, leaks.num_rows))
    counts |= {
        "images": counts["images"] - leaks.num_rows,
        "leaked": leaks.num_rows,
        "duplicates": count_duplicates(context.store, [entry for entry in files if entry.name.startswith("index/")]),
    }
    kinds = dict(sorted(Counter(leaks["kind"].to_pylist()).items()))
    return StageResult(tuple(files), {SPLIT: counts, "leaks": kinds, "class_names": data.metrics["class_names"]})


def guard(context: StageContext, config: LeakConfig, data: Manifest, shards: Sequence[SourceShard]) -> list[Part]:
    """Find the leaks of each shard. A part has `leaks.parquet` and, where there are any, the index without them."""
    evaluation = {
        split: list(zip(data.files_under(f"index/{split}/"), data.files_under(f"thumbnails/{split}/"), strict=True))
        for split in EVALUATION_SPLITS
    }
    identity = [[index.sha256, pictures.sha256] for split in EVALUATION_SPLITS for index, pictures in evaluation[split]]
    shared = {"version": GUARD_VERSION, "config": config.key_fields(), "evaluation": identity}
    keys = [digest({**shared, "shard": [entry.sha256 for entry in _read(shard)]}) for shard in shards]
    found = find_parts(context.store, GUARD, keys, NO_NUMERICS)
    missing = [place for place, key in enumerate(keys) if found[key] is None]
    sizes = [shards[place].index.rows or 0 for place in missing]
    specs = [
        {
            "store": context.store.url,
            "config": config.model_dump(mode="json"),
            "evaluation": {s: [[e.model_dump() for e in pair] for pair in pairs] for s, pairs in evaluation.items()},
            "shards": {keys[missing[n]]: [e.model_dump() for e in _read(shards[missing[n]])] for n in group},
        }
        for group in group_shards(sizes, context.engine.processes, context.compute)
    ]
    context.engine.map("tasks.unlabeled:guard_shards", specs, context.progress_of(sum(sizes)))
    if missing:
        found = find_parts(context.store, GUARD, keys, NO_NUMERICS)
    return made_parts(GUARD, found, keys)


def guard_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: find the leaks of the shards `spec["shards"]` (part key -> index and thumbnails)."""
    store, config = Store(spec["store"]), LeakConfig.model_validate(spec["config"])
    tables = []
    for split, pairs in spec["evaluation"].items():
        for pair in pairs:
            index, thumbnails = _load(store, pair)
            keys = [f"{split}/{key}" for key in index["key"].to_pylist()]
            tables.append(evaluation_table(keys, index["sha256"].to_pylist(), thumbnails))
    leaks = LeakIndex(config, pa.concat_tables(tables))
    shards = {key: [FileEntry.model_validate(raw) for raw in pair] for key, pair in spec["shards"].items()}
    done, total = 0, sum(index.rows or 0 for index, _ in shards.values())
    for key, pair in shards.items():
        if worker.stop_requested:
            raise Stopped
        if find_part(store, GUARD, key, NO_NUMERICS) is None:
            worker.at(pair[0].path)
            _guard_shard(store, key, leaks, pair)
        done += pair[0].rows or 0
        worker.progress(done, total)
    worker.progress(total, total, last=True)
    return {}


def count_duplicates(store: Store, indices: Sequence[FileEntry]) -> int:
    """How many images have the bytes of another one before them, told by 64 bits of their sha256.

    On disk 8 bytes an image, in memory `BUCKET_IMAGES` of them: the digests go to buckets by their first bits.
    """
    total = sum(entry.rows or 0 for entry in indices)
    bits = min(MOST_BUCKET_BITS, (total // BUCKET_IMAGES).bit_length())
    with store.staging() as folder, ExitStack() as files:
        streams = [files.enter_context((folder / f"{number}").open("w+b")) for number in range(1 << bits)]
        for entry in indices:
            digests = first_64_bits(read_table(store, entry, ["sha256"])["sha256"])
            buckets = (digests >> np.uint64(63 - bits) >> np.uint64(1)).astype(np.intp)
            for number in np.unique(buckets):
                streams[number].write(digests[buckets == number].data)
        found = 0
        for stream in streams:
            stream.seek(0)
            own = np.fromfile(stream, np.uint64)
            found += len(own) - len(np.unique(own))
    return found


def first_64_bits(digests: pa.ChunkedArray) -> np.ndarray:
    """The first 64 bits of hex digests, uint64 [n]."""
    return np.frombuffer(bytes.fromhex("".join(text[:16] for text in digests.to_pylist())), ">u8").astype(np.uint64)


def _all_leaks(store: Store, shards: Sequence[str], guarded: Sequence[Part]) -> pa.Table:
    """The leaks of all shards, each with its shard's name."""
    tables = [LEAKS_SCHEMA.append(pa.field("shard", pa.string())).empty_table()]
    found = read_tables(store, [part.file(LEAKS_FILE) for part in guarded])
    for shard, table in zip(shards, found, strict=False):
        tables.append(table.append_column("shard", pa.array([shard] * len(table), pa.string())))
    return pa.concat_tables(tables)


def _read(shard: SourceShard) -> list[FileEntry]:
    """What guarding a shard reads."""
    return [shard.index, shard.thumbnails]


def _load(store: Store, pair: Sequence[Any]) -> tuple[pa.Table, np.ndarray]:
    """An index and the thumbnails of its images, uint8 [rows, SIDE, SIDE]."""
    index, pictures = (read_table(store, FileEntry.model_validate(entry)) for entry in pair)
    return index, _pixels(pictures)


def _pixels(pictures: pa.Table | pa.RecordBatch) -> np.ndarray:
    """Thumbnails, uint8 [rows, SIDE, SIDE]."""
    return np.frombuffer(b"".join(pictures["thumbnail"].to_pylist()), np.uint8).reshape(-1, SIDE, SIDE)


def _guard_shard(store: Store, key: str, leaks: LeakIndex, pair: Sequence[FileEntry]) -> None:
    rows: list[dict[str, Any]] = []
    with store.staging() as folder, TableWriter(folder / "index.parquet", INDEX_SCHEMA) as kept:
        for index, pictures in zip(*(read_batches(store, entry, BATCH_ROWS) for entry in pair), strict=True):
            found = leaks.find(index["sha256"].to_pylist(), _pixels(pictures))
            rows += [_leak_row(index, place, leak) for place, leak in enumerate(found) if leak is not None]
            kept.write(index.filter(pa.array([leak is None for leak in found])))
        kept.close()
        write_parquet(folder / LEAKS_FILE, pa.Table.from_pylist(rows, LEAKS_SCHEMA))
        files: dict[str, tuple[Any, int | None]] = {LEAKS_FILE: (folder / LEAKS_FILE, len(rows))}
        if rows:
            files["index.parquet"] = (kept.path, kept.num_rows)
        publish_part(store, GUARD, key, NO_NUMERICS, files)


def _leak_row(index: pa.RecordBatch, place: int, leak: Leak) -> dict[str, Any]:
    return {
        "evaluation_key": leak.evaluation_key,
        "kind": leak.kind,
        "distance": leak.distance,
        **{name: index[name][place].as_py() for name in ("key", "source", "offset", "bytes", "sha256")},
    }
