"""select: confidence filter and class balancing (paper, section 3.1), then balanced WebDataset shards.

Of each class the images with confidence >= min_confidence are kept, at most images_per_class, the most confident first;
a class with fewer is duplicated at random, as evenly as can be, up to images_per_class. Ties go by key, chance by a
hash of seed and key: the selection is the same on every machine.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from models.compute import group_shards
from models.predictions import read_probabilities
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Manifest, Part, find_part, find_parts, get, made_parts, publish_part
from storage.errors import StoreError, UserError
from storage.images import image_extension
from storage.keys import Config, digest
from storage.objects import Store
from storage.shards import (
    INDEX_SCHEMA,
    ROW_GROUP_ROWS,
    ShardReader,
    ShardSample,
    index_name,
    npy_bytes,
    shard_files,
    write_parquet,
    write_tar,
)
from tasks.contract import StageContext, StageResult
from tasks.prepare import NO_NUMERICS

VERSION = 1
SELECTION_SCHEMA = pa.schema(
    [
        *INDEX_SCHEMA,
        ("source_key", pa.string()),
        ("copy", pa.int32()),
        ("confidence", pa.float32()),
        ("soft_offset", pa.int64()),  # of the soft label's .npy in the tar
        ("soft_bytes", pa.int64()),
        ("soft_sha256", pa.string()),
    ]
)


class SelectConfig(Config):
    """Which pseudo-labeled images a student learns from, and how many copies of each."""

    min_confidence: float = Field(0.3, ge=0, le=1, description="least confidence of a kept image (paper: 0.3)")
    images_per_class: int = Field(130_000, ge=1, description="cap of a class, and the target of duplication")
    on_empty_class: Literal["error", "skip"] = Field("error", description="what a class with no image left does")
    shard_images: int = Field(10_000, ge=1, description="images of an output shard, at most")
    seed: int = Field(0, ge=0, description="of the choice of duplicates and of the order of the shards")


def select(context: StageContext, config: SelectConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Select from `inputs["labels"]` of `inputs["data"]` and write the balanced shards.

    Raises UserError where a class stays empty and on_empty_class is `error`.
    """
    data, labels = inputs["data"], inputs["labels"]
    plan = _plan_part(context, config, data, labels)
    layout = plan.file("layout.parquet")
    num_shards = -(-(layout.rows or 0) // config.shard_images)
    keys = [digest({"version": VERSION, "selection": context.key, "shard": n}) for n in range(num_shards)]
    found = find_parts(context.store, "select", keys, NO_NUMERICS)
    missing = [n for n in range(num_shards) if found[keys[n]] is None]
    sizes = [min(config.shard_images, (layout.rows or 0) - n * config.shard_images) for n in missing]
    specs = [
        {
            "store": context.store.url,
            "config": config.model_dump(mode="json"),
            "layout": layout.model_dump(),
            "labels": labels.key,
            "data": data.key,
            "parts": {str(missing[place]): keys[missing[place]] for place in group},
        }
        for group in group_shards(sizes, context.engine.processes, context.compute)
    ]
    context.engine.map("tasks.select:write_shards", specs, context.progress_of(layout.rows or 0))
    if missing:
        found = find_parts(context.store, "select", keys, NO_NUMERICS)
    files = [plan.file("decisions.parquet")]
    for number, part in enumerate(made_parts("select", found, keys)):
        shard = part.file("shard.tar").model_copy(update={"name": f"shards/train/{number:05d}.tar"})
        files += [shard, part.file("index.parquet").model_copy(update={"name": index_name(shard)})]
    return StageResult(tuple(files), {**plan.facts, "class_names": data.metrics["class_names"]})


def decide(predictions: list[Path], config: SelectConfig) -> Iterator[pa.RecordBatch]:
    """Every prediction with its fate, ordered by label, falling confidence, key.

    Columns: key, label, confidence, decision (`kept`, `below_confidence`, `over_cap`), copies (0 where not kept),
    file and row (where the prediction stands).
    """
    query = """
        WITH scored AS (
            SELECT key, label, confidence, place_of_file::INTEGER AS file, file_row_number::BIGINT AS row
            FROM read_parquet($files, filename = true, file_row_number = true, hive_partitioning = false)
            JOIN (SELECT unnest($files) AS filename, unnest(range(len($files))) AS place_of_file) USING (filename)
        ), ranked AS (
            SELECT *, confidence >= $least::FLOAT AS confident,
                row_number() OVER (PARTITION BY label, confidence >= $least::FLOAT ORDER BY confidence DESC, key) AS place
            FROM scored
        ), kept AS (
            SELECT key,
                count(*) OVER (PARTITION BY label) AS available,
                row_number() OVER (PARTITION BY label ORDER BY md5(concat($seed, '|', key)), key) AS luck
            FROM ranked WHERE confident AND place <= $cap
        )
        SELECT ranked.key, label, confidence,
            CASE WHEN NOT confident THEN 'below_confidence' WHEN place > $cap THEN 'over_cap' ELSE 'kept' END AS decision,
            coalesce($cap // available + (luck <= $cap % available)::INTEGER, 0)::INTEGER AS copies, file, row
        FROM ranked LEFT JOIN kept ON ranked.key = kept.key
        ORDER BY label, confidence DESC, ranked.key
    """
    values = {
        "files": [str(path) for path in predictions],
        "least": config.min_confidence,
        "cap": config.images_per_class,
        "seed": str(config.seed),
    }
    yield from _connect().sql(query, params=values).to_arrow_reader(ROW_GROUP_ROWS)


def lay_out(decisions: Path, indices: list[tuple[str, Path]], seed: int) -> Iterator[pa.RecordBatch]:
    """One row for each copy to be written, in the global order of the output; with where its image lies now.

    `indices`: (object path of a tar, local path of its Parquet index).
    """
    query = """
        WITH copies AS (
            SELECT key, label, confidence, file, row, unnest(range(copies))::INTEGER AS copy
            FROM read_parquet($decisions, hive_partitioning = false) WHERE copies > 0
        ), images AS (
            SELECT key, shard, "offset", bytes, sha256, width, height, source
            FROM read_parquet($indices, filename = true, hive_partitioning = false)
            JOIN (SELECT unnest($indices) AS filename, unnest($shards) AS shard) USING (filename)
        )
        SELECT copies.key AS source_key, copy, label, confidence, file, row, shard, "offset", bytes, sha256, width, height, source
        FROM copies JOIN images ON copies.key = images.key
        ORDER BY md5(concat($seed, '|', copies.key, '|', copy)), copies.key, copy
    """
    values = {
        "decisions": str(decisions),
        "indices": [str(path) for _, path in indices],
        "shards": [shard for shard, _ in indices],
        "seed": str(seed),
    }
    yield from _connect().sql(query, params=values).to_arrow_reader(ROW_GROUP_ROWS)


def write_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: write the output shards `spec["parts"]` (number -> part key), each a part."""
    store, config = Store(spec["store"]), SelectConfig.model_validate(spec["config"])
    layout = FileEntry.model_validate(spec["layout"])
    labels = get(store, "labels", spec["labels"])
    reader, done = ShardReader(store, shard_files(get(store, "dataset", spec["data"]), "unlabeled")), 0
    total = len(spec["parts"]) * config.shard_images
    for number, part_key in spec["parts"].items():
        if worker.stop_requested:
            raise Stopped
        rows = _layout_rows(store, layout, int(number), config.shard_images)
        if find_part(store, "select", part_key, NO_NUMERICS) is None:
            _write_shard(store, part_key, rows, labels, reader)
        done += len(rows)
        worker.progress(done, total)
    worker.progress(done, done, last=True)
    return {}


def _connect() -> Any:
    import duckdb

    connection = duckdb.connect()
    connection.execute("SET preserve_insertion_order = true")
    return connection


def _plan_part(context: StageContext, config: SelectConfig, data: Manifest, labels: Manifest) -> Part:
    """The decisions and the layout, as a part of their own: made once, kept after a crash."""
    store, key = context.store, digest({"version": VERSION, "selection": context.key, "plan": True})
    existing = find_part(store, "select", key, NO_NUMERICS)
    if existing is not None:
        return existing
    shards = shard_files(data, "unlabeled")
    with (
        store.staging() as folder,
        store.local_copies(labels.files_under("predictions/")) as predictions,
        store.local_copies([data.file(index_name(shard)) for shard in shards]) as copies,
    ):
        indices = [(shard.path, copy) for shard, copy in zip(shards, copies, strict=True)]
        decisions, layout = folder / "decisions.parquet", folder / "layout.parquet"
        num_decisions = _write_batches(decisions, decide(predictions, config))
        facts = _summary(decisions, config, labels.metrics["class_names"])
        num_copies = _write_batches(layout, lay_out(decisions, indices, config.seed))
        if num_copies != facts["total"]:
            raise StoreError(
                f"labels {labels.key} hold images that data set {data.key} has not; they are of another one"
            )
        files = {"decisions.parquet": (decisions, num_decisions), "layout.parquet": (layout, num_copies)}
        return publish_part(store, "select", key, NO_NUMERICS, files, facts)


def _write_batches(path: Path, batches: Iterator[pa.RecordBatch]) -> int:
    """Write batches in the project's Parquet form; returns the rows. Row groups do not depend on the batches' sizes."""
    table = pa.Table.from_batches(list(batches))
    write_parquet(path, table)
    return table.num_rows


def _summary(decisions: Path, config: SelectConfig, class_names: list[str]) -> dict[str, Any]:
    """Counts by class. Raises UserError on a class without an image, unless it may be skipped."""
    table = pq.read_table(decisions, columns=["label", "decision", "copies"])
    labels, copies = table["label"].to_numpy(), table["copies"].to_numpy()
    kept = pc.equal(table["decision"], "kept").to_numpy(zero_copy_only=False)
    per_class = {
        "available": np.bincount(labels, minlength=len(class_names)),
        "kept": np.bincount(labels[kept], minlength=len(class_names)),
        "copies": np.bincount(labels, weights=copies, minlength=len(class_names)).astype(np.int64),
    }
    empty = np.flatnonzero(per_class["kept"] == 0)
    if len(empty) and (config.on_empty_class == "error" or len(empty) == len(class_names)):
        others = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(
            f"class {empty[0]} ({class_names[empty[0]]}){others} has 0 images at confidence >= {config.min_confidence:.2f}, "
            "so it cannot be balanced. Lower select.min_confidence or set select.on_empty_class=skip"
        )
    num_kept, total = int(kept.sum()), int(copies.sum())
    return {
        "labeled": len(labels),
        "kept": num_kept,
        "dropped": len(labels) - num_kept,
        "duplicated": total - num_kept,
        "total": total,
        "per_class": {name: [int(value) for value in values] for name, values in per_class.items()},
    }


def _layout_rows(store: Store, layout: FileEntry, number: int, shard_images: int) -> list[dict[str, Any]]:
    """The layout's rows of one output shard; reads only the row groups that hold them."""
    first, last = number * shard_images, (number + 1) * shard_images
    with store.local_copy(layout) as path:
        reader = pq.ParquetFile(path)
        groups = range(first // ROW_GROUP_ROWS, min(reader.num_row_groups, -(-last // ROW_GROUP_ROWS)))
        table = reader.read_row_groups(list(groups)).slice(first - groups.start * ROW_GROUP_ROWS, shard_images)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _write_shard(
    store: Store, part_key: str, rows: list[dict[str, Any]], labels: Manifest, reader: ShardReader
) -> None:
    soft_labels = _soft_labels(store, labels, rows)

    def samples() -> Iterator[ShardSample]:
        for row, soft in zip(rows, soft_labels, strict=True):
            row["key"] = f"{row['source_key']}-c{row['copy']}"
            image = reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"])
            facts = {
                "class": row["label"],
                "confidence": row["confidence"],
                "labeled_by": labels.inputs["model"],
                "source_key": row["source_key"],
                "source": row["source"],
                "copy": row["copy"],
            }
            row["extension"] = image_extension(image)
            label = npy_bytes(soft)
            row["soft_sha256"] = hashlib.sha256(label).hexdigest()
            members = {
                row["extension"]: image,
                "npy": label,
                "json": json.dumps(facts, sort_keys=True).encode(),
            }
            yield ShardSample(row["key"], members)

    with store.staging() as folder:
        places = write_tar(folder / "shard.tar", samples())
        for row, place in zip(rows, places, strict=True):
            row["offset"], row["bytes"] = place[row["extension"]]
            row["soft_offset"], row["soft_bytes"] = place["npy"]
        index = pa.Table.from_pylist(
            [{name: row[name] for name in SELECTION_SCHEMA.names} for row in rows], SELECTION_SCHEMA
        )
        write_parquet(folder / "index.parquet", index)
        files = {name: (folder / name, len(rows)) for name in ("shard.tar", "index.parquet")}
        publish_part(store, "select", part_key, NO_NUMERICS, files)


def _soft_labels(store: Store, labels: Manifest, rows: list[dict[str, Any]]) -> np.ndarray:
    """The probabilities of each row, float16 [rows, classes], read from the parts that hold them."""
    files = labels.files_under("probabilities/")
    found = np.zeros((len(rows), len(labels.metrics["class_names"])), np.float16)
    by_file: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_file.setdefault(row["file"], []).append(place)
    for number, places in sorted(by_file.items()):
        found[places] = read_probabilities(store, labels, files[number], [rows[place]["row"] for place in places])
    return found
