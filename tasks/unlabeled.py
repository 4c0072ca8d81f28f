"""unlabeled: the images whose labels nobody knows -> shards (or tars of others, registered where they lie), guarded.

Validation and test images that hide among them are left out: of the index, which is what says what the data set holds.
A shard is made once, whatever the evaluation images are; guarding it reads its hashes and thumbnails only.
"""

from collections.abc import Sequence
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
from storage.keys import digest
from storage.objects import Store
from storage.phash import SIDE
from storage.shards import read_table, read_tables, write_parquet
from tasks.contract import StageContext, StageResult
from tasks.ingest import (
    NO_NUMERICS,
    DataConfig,
    check_rejects,
    ingest,
    name_files,
    open_source,
    plan_stretches,
    shard_entry,
)
from tasks.leaks import LEAKS_SCHEMA, LeakConfig, LeakIndex, evaluation_table

VERSION = 1
GUARD = "guard"
GUARD_VERSION = 1
SPLIT = "unlabeled"
EVALUATION_SPLITS = ("val", "test")
DUPLICATES_MEMORY = "1GB"


class UnlabeledConfig(DataConfig):
    """The data settings, of which the unlabeled images depend on these."""

    not_in_key: ClassVar[tuple[str, ...]] = (
        *DataConfig.not_in_key,
        *("labeled", "val", "test", "class_names", "min_images_per_class", "seed"),
    )


def unlabeled(context: StageContext, config: UnlabeledConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Make the data set of unlabeled images, without those of `inputs["data"]`'s validation and test sets.

    Raises UserError on missing files and on too many rejects.
    """
    source = open_source(config)
    parts = ingest(context, config, plan_stretches(config, source.files([SPLIT])))
    counts = check_rejects(config, SPLIT, parts)
    rejects = [part.file("rejects.parquet") for part in parts]
    files: list[FileEntry] = []
    indices, found = [part.file("index.parquet") for part in parts], LEAKS_SCHEMA.empty_table()
    if config.leaks.enabled:
        guarded = guard(context, config.leaks, inputs["data"], parts)
        kept = [next((e for e in part.files if e.name == "index.parquet"), None) for part in guarded]
        indices = [own or before for own, before in zip(kept, indices, strict=True)]
        found = pa.concat_tables(read_tables(context.store, [part.file("leaks.parquet") for part in guarded]))
    files = name_files(SPLIT, list(zip(map(shard_entry, parts), indices, strict=True)), rejects)
    with context.store.staging() as folder:
        write_parquet(folder / "leaks.parquet", found)
        place = artifact_folder("dataset", context.key)
        files.append(publish_file(context.store, place, "leaks.parquet", folder / "leaks.parquet", found.num_rows))
    counts |= {
        "images": counts["images"] - found.num_rows,
        "leaked": found.num_rows,
        "duplicates": count_duplicates(context.store, [entry for entry in files if entry.name.startswith("index/")]),
    }
    kinds = {kind: int(np.sum(found["kind"].to_numpy() == kind)) for kind in sorted(set(found["kind"].to_pylist()))}
    metrics = {SPLIT: counts, "leaks": kinds, "class_names": inputs["data"].metrics["class_names"]}
    return StageResult(tuple(files), metrics)


def guard(context: StageContext, config: LeakConfig, data: Manifest, parts: Sequence[Part]) -> list[Part]:
    """Find the leaks of each shard. A part has `leaks.parquet` and, where there are any, the index without them."""
    evaluation = {
        split: list(zip(data.files_under(f"index/{split}/"), data.files_under(f"thumbnails/{split}/"), strict=True))
        for split in EVALUATION_SPLITS
    }
    identity = [[index.sha256, pictures.sha256] for split in EVALUATION_SPLITS for index, pictures in evaluation[split]]
    shared = {"version": GUARD_VERSION, "config": config.key_fields(), "evaluation": identity}
    keys = [digest({**shared, "shard": [entry.sha256 for entry in _read(part)]}) for part in parts]
    found = find_parts(context.store, GUARD, keys, NO_NUMERICS)
    missing = [place for place, key in enumerate(keys) if found[key] is None]
    sizes = [parts[place].file("index.parquet").rows or 0 for place in missing]
    specs = [
        {
            "store": context.store.url,
            "config": config.model_dump(mode="json"),
            "evaluation": {s: [[e.model_dump() for e in pair] for pair in pairs] for s, pairs in evaluation.items()},
            "shards": {keys[missing[n]]: [e.model_dump() for e in _read(parts[missing[n]])] for n in group},
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
            _guard_shard(store, key, leaks, pair)
        done += pair[0].rows or 0
        worker.progress(done, total)
    worker.progress(total, total, last=True)
    return {}


def count_duplicates(store: Store, indices: Sequence[FileEntry]) -> int:
    """How many images have the bytes of another one before them. Out of core."""
    import duckdb

    with store.local_copies(indices) as paths, store.staging() as folder, duckdb.connect() as connection:
        connection.execute(f"SET memory_limit = '{DUPLICATES_MEMORY}'")
        connection.execute("SET temp_directory = $folder", {"folder": str(folder)})
        query = """
            SELECT coalesce(sum(images - 1), 0)::BIGINT FROM (
                SELECT count(*) AS images FROM read_parquet($files, hive_partitioning = false) GROUP BY sha256
            )
        """
        (found,) = connection.execute(query, {"files": [str(path) for path in paths]}).fetchone() or (0,)
    return int(found)


def _read(part: Part) -> list[FileEntry]:
    """What guarding a shard reads."""
    return [part.file("index.parquet"), part.file("thumbnails.parquet")]


def _load(store: Store, pair: Sequence[Any]) -> tuple[pa.Table, np.ndarray]:
    """An index and the thumbnails of its images, uint8 [rows, SIDE, SIDE]."""
    index, pictures = (read_table(store, FileEntry.model_validate(entry)) for entry in pair)
    pixels = b"".join(pictures["thumbnail"].to_pylist())
    return index, np.frombuffer(pixels, np.uint8).reshape(index.num_rows, SIDE, SIDE)


def _guard_shard(store: Store, key: str, leaks: LeakIndex, pair: Sequence[FileEntry]) -> None:
    index, thumbnails = _load(store, pair)
    found = leaks.find(index["sha256"].to_pylist(), thumbnails)
    places = [place for place, leak in enumerate(found) if leak is not None]
    rows = [
        {
            "key": index["key"][place].as_py(),
            "source": index["source"][place].as_py(),
            "evaluation_key": leak.evaluation_key,
            "kind": leak.kind,
            "distance": leak.distance,
        }
        for place, leak in enumerate(found)
        if leak is not None
    ]
    with store.staging() as folder:
        write_parquet(folder / "leaks.parquet", pa.Table.from_pylist(rows, LEAKS_SCHEMA))
        files: dict[str, tuple[Any, int | None]] = {"leaks.parquet": (folder / "leaks.parquet", len(rows))}
        if places:
            kept = index.take(np.delete(np.arange(index.num_rows), places))
            write_parquet(folder / "index.parquet", kept)
            files["index.parquet"] = (folder / "index.parquet", kept.num_rows)
        publish_part(store, GUARD, key, NO_NUMERICS, files)
