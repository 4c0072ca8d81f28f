"""prepare: images of any source -> WebDataset shards with a Parquet index, and a table of rejects.

A shard is a part: its key is made from the files and rows it holds, so new files leave the other shards as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from models.compute import group_shards
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Manifest, Part, find_part, find_parts, made_parts, publish_part
from storage.backend import refuse_credentials
from storage.errors import UserError
from storage.images import ImageError, decode_rgb, image_extension
from storage.keys import Config, digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardSample, index_name, read_tables, write_parquet, write_tar
from tasks.contract import StageContext, StageResult
from tasks.sources import SPLITS, Source, SourceFile
from tasks.sources.digits import DigitsConfig, DigitsSource
from tasks.sources.parquet import ParquetSource

VERSION = 1
NO_NUMERICS: dict[str, Any] = {}
REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
FIRST_REJECTS = 3


class PrepareConfig(Config):
    """Where the images are and how they are cut into shards."""

    not_in_key: ClassVar[tuple[str, ...]] = ("root",)

    source: Literal["parquet", "digits"] = "parquet"
    root: str = Field(".", description="folder or s3:// URL of the files; no part of the key")
    labeled: str = Field("labeled*.parquet", description="file, pattern or folder of the labeled images")
    val: str = Field("val*.parquet", description="validation images: settings are chosen on these")
    test: str = Field("test*.parquet", description="test images: reported on, never chosen on")
    unlabeled: str = Field("unlabeled*.parquet", description="images whose labels, if any, are not read")
    class_names: tuple[str, ...] = Field((), description="classes by label; empty: from the files")
    shard_images: int = Field(10_000, ge=1, description="images of a shard, at most")
    min_images_per_class: int = Field(2, ge=1, description="fewer labeled images of a class are an error")
    max_reject_fraction: float = Field(0.05, ge=0, le=1, description="more undecodable images of a split are an error")
    seed: int = Field(0, ge=0, description="of the labeled images' order")
    digits: DigitsConfig = DigitsConfig()

    @field_validator("root")
    @classmethod
    def _without_credentials(cls, root: str) -> str:
        return refuse_credentials(root, "data.root")  # before Prefect or a run record keeps it


class ShardPlan(Config):
    """One shard to be: its split and its rows, as (file, rows) in order."""

    split: str
    pieces: tuple[tuple[SourceFile, tuple[int, ...]], ...]

    def part_key(self) -> str:
        """Made from what enters the shard, not from its number."""
        pieces = [(file.name, file.sha256, digest(rows)) for file, rows in self.pieces]
        kind = {"labeled": self.split != "unlabeled", "shuffled": self.split == "labeled"}
        return digest({"version": VERSION, **kind, "pieces": pieces})

    @property
    def num_images(self) -> int:
        """Rows of the source, decodable or not."""
        return sum(len(rows) for _, rows in self.pieces)


def open_source(config: PrepareConfig) -> Source:
    """The source that the config names."""
    if config.source == "digits":
        return DigitsSource(config.digits)
    return ParquetSource(config.root, {split: getattr(config, split) for split in SPLITS})


def fingerprint(files: Sequence[SourceFile]) -> str:
    """The identity of the external data: its sorted listing, by content. Moving or touching files changes nothing."""
    return digest([file.model_dump() for file in files])


def prepare(context: StageContext, config: PrepareConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Make the data set. Raises UserError on missing files, labels or classes, and on too many rejects."""
    source = open_source(config)
    files = source.files()
    labels = {file.name: source.labels(file) for file in files if file.split != "unlabeled"}
    class_names = check_labels(config, source.class_names(), files, labels)
    plans = plan_shards(config, files)
    parts = _make_shards(context, config, plans)
    entries, counts = _collect(context.store, config, plans, parts)
    per_class = _labeled_per_class(context.store, entries, len(class_names))
    for number, count in enumerate(per_class):
        _check_class_size(config, class_names[number], number, count, "decodable labeled images")
    metrics = {**counts, "class_names": class_names, "labeled_per_class": per_class}
    return StageResult(entries, metrics)


def check_labels(
    config: PrepareConfig, own_names: list[str], files: Sequence[SourceFile], labels: dict[str, np.ndarray]
) -> list[str]:
    """The class names, after checking every label against them. Reads no image."""
    labeled = [file for file in files if file.split != "unlabeled"]
    if not any(len(labels[file.name]) for file in labeled if file.split == "labeled"):
        raise UserError(f"data.labeled={config.labeled!r}: the files hold no rows; point it at labeled images")
    largest = max((int(labels[f.name].max()) for f in labeled if len(labels[f.name])), default=0)
    num_labeled = sum(len(labels[file.name]) for file in labeled if file.split == "labeled")
    if not config.class_names and not own_names and largest >= num_labeled:  # before a list of 2**63 names is made
        raise UserError(
            f"data.labeled={config.labeled!r}: {num_labeled} images cannot fill the classes 0..{largest} that their labels "
            "name; number the classes from 0 without gaps, or set data.class_names"
        )
    class_names = list(config.class_names) or own_names or [str(number) for number in range(largest + 1)]
    if len(set(class_names)) != len(class_names):
        raise UserError("data.class_names: a class name occurs twice; names must differ")
    if len(class_names) < 2:
        raise UserError(f"data.labeled={config.labeled!r}: found one class only; a classifier needs two or more")
    for file in labeled:
        outside = np.flatnonzero((labels[file.name] < 0) | (labels[file.name] >= len(class_names)))
        if len(outside):
            raise UserError(
                f"{file.name}: row {outside[0]} has label {labels[file.name][outside[0]]}, outside the {len(class_names)} "
                f"classes 0..{len(class_names) - 1} ({len(outside)} such rows); correct the labels or data.class_names"
            )
    train = np.concatenate([labels[f.name] for f in labeled if f.split == "labeled"])
    for number, count in enumerate(np.bincount(train, minlength=len(class_names))):
        _check_class_size(config, class_names[number], number, int(count), f"images in data.labeled={config.labeled!r}")
    return class_names


def plan_shards(config: PrepareConfig, files: Sequence[SourceFile]) -> list[ShardPlan]:
    """Cut the splits into shards: labeled images shuffled by seed over all files, the others file by file in order.

    Unshuffled labeled images come as class folders do, one class a block.
    """
    plans = []
    for split in SPLITS:
        own = [file for file in files if file.split == split]
        if split == "labeled":
            rows = [(number, row) for number, file in enumerate(own) for row in range(file.rows)]
            order = np.random.default_rng(config.seed).permutation(len(rows))
            shuffled = [rows[i] for i in order]
            for start in range(0, len(rows), config.shard_images):
                plans.append(_plan(split, own, shuffled[start : start + config.shard_images]))
            continue
        for number, file in enumerate(own):
            for start in range(0, file.rows, config.shard_images):
                end = min(file.rows, start + config.shard_images)
                plans.append(_plan(split, own, [(number, row) for row in range(start, end)]))
    return plans


def write_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: make the shards of `spec["plans"]`, each a part, and publish those that are missing."""
    store, config = Store(spec["store"]), PrepareConfig.model_validate(spec["config"])
    source = open_source(config)
    plans = [ShardPlan.model_validate(raw) for raw in spec["plans"]]
    labels: dict[str, np.ndarray] = {}
    done, total = 0, sum(plan.num_images for plan in plans)
    for plan in plans:
        if worker.stop_requested:
            raise Stopped
        if find_part(store, "prepare", plan.part_key(), NO_NUMERICS) is None:
            for file, _ in plan.pieces:
                if plan.split != "unlabeled" and file.name not in labels:
                    labels[file.name] = source.labels(file)
            _write_shard(store, plan, source, labels)
        done += plan.num_images
        worker.progress(done, total)
    worker.progress(total, total, last=True)
    return {}


def sample_key(file: SourceFile, row: int) -> str:
    """A sample's key: stable, unique, and free of the dots and slashes that WebDataset gives a meaning."""
    stem = file.name.removesuffix(".parquet")
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in stem)
    if safe != stem:
        safe = f"{safe}-{digest(file.name)[:8]}"
    return f"{safe}-{row:08d}"


def _plan(split: str, files: Sequence[SourceFile], rows: Sequence[tuple[int, int]]) -> ShardPlan:
    """A shard of these (file number, row); in each file's own order, so that reading touches a row group once."""
    by_file: dict[int, list[int]] = {}
    for number, row in rows:
        by_file.setdefault(number, []).append(row)
    return ShardPlan(
        split=split, pieces=tuple((files[number], tuple(sorted(found))) for number, found in sorted(by_file.items()))
    )


def _make_shards(context: StageContext, config: PrepareConfig, plans: list[ShardPlan]) -> list[Part]:
    """Make the missing shards in child processes, then read all parts."""
    keys = [plan.part_key() for plan in plans]
    found = find_parts(context.store, "prepare", keys, NO_NUMERICS)
    missing = [plan for plan, key in zip(plans, keys, strict=True) if found[key] is None]
    groups = group_shards([plan.num_images for plan in missing], context.engine.processes, context.compute)
    specs = [
        {
            "store": context.store.url,
            "config": config.model_dump(mode="json"),
            "plans": [missing[place].model_dump(mode="json") for place in group],
        }
        for group in groups
    ]
    context.engine.map("tasks.prepare:write_shards", specs, context.progress_of(sum(p.num_images for p in missing)))
    if missing:
        found = find_parts(context.store, "prepare", keys, NO_NUMERICS)
    return made_parts("prepare", found, keys)


def _write_shard(store: Store, plan: ShardPlan, source: Source, labels: dict[str, np.ndarray]) -> None:
    rejects: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []

    def samples() -> Iterator[ShardSample]:
        for row in rows:
            members = {row["extension"]: row["data"]}
            if row["label"] >= 0:
                members["cls"] = str(row["label"]).encode()
            yield ShardSample(row["key"], members)

    for file, numbers in plan.pieces:
        for number, raw in zip(numbers, source.read(file, numbers), strict=True):
            try:
                rows.append(_checked_row(file, number, raw.data, raw.path, labels))
            except ImageError as error:
                rejects.append({"source": f"{file.name}:{raw.path}", "row": number, "reason": str(error)})
    if plan.split == "labeled":  # was read file by file; the order of decoded rows depends on nothing else
        rows = [rows[i] for i in np.random.default_rng(int(plan.part_key()[:15], 16)).permutation(len(rows))]
    with store.staging() as folder:
        places = write_tar(folder / "shard.tar", samples())
        for row, place in zip(rows, places, strict=True):
            row["offset"], row["bytes"] = place[row["extension"]]
        index = pa.Table.from_pylist([{f: row[f] for f in INDEX_SCHEMA.names} for row in rows], INDEX_SCHEMA)
        write_parquet(folder / "index.parquet", index)
        write_parquet(folder / "rejects.parquet", pa.Table.from_pylist(rejects, REJECTS_SCHEMA))
        files = {
            "shard.tar": (folder / "shard.tar", len(rows)),
            "index.parquet": (folder / "index.parquet", len(rows)),
            "rejects.parquet": (folder / "rejects.parquet", len(rejects)),
        }
        facts = {"rejects": [f"{r['source']} row {r['row']}: {r['reason']}" for r in rejects[:FIRST_REJECTS]]}
        publish_part(store, "prepare", plan.part_key(), NO_NUMERICS, files, facts)


def _checked_row(
    file: SourceFile, number: int, data: bytes, path: str, labels: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The index row of an image that decodes. Raises ImageError with the reason where it does not."""
    import hashlib

    image = decode_rgb(data)
    return {
        "key": sample_key(file, number),
        "data": data,
        "extension": image_extension(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "label": int(labels[file.name][number]) if file.name in labels else -1,
        "width": image.width,
        "height": image.height,
        "source": f"{file.name}:{path}" if path else f"{file.name}:{number}",
    }


def _collect(
    store: Store, config: PrepareConfig, plans: list[ShardPlan], parts: list[Part]
) -> tuple[tuple[FileEntry, ...], dict[str, Any]]:
    """Name the parts' files within the data set, and count. Raises UserError on too many rejects of a split."""
    entries: list[FileEntry] = []
    counts: dict[str, Any] = {}
    for split in SPLITS:
        own = [part for plan, part in zip(plans, parts, strict=True) if plan.split == split]
        kept, rejected = (sum(p.file(n).rows or 0 for p in own) for n in ("shard.tar", "rejects.parquet"))
        if rejected > config.max_reject_fraction * (kept + rejected) or not kept:
            first = "; ".join([reason for part in own for reason in part.facts["rejects"]][:FIRST_REJECTS])
            raise UserError(
                f"data.{split}: {rejected} of {kept + rejected} images cannot be decoded, more than "
                f"data.max_reject_fraction={config.max_reject_fraction} allows ({first or 'the files hold no rows'}); mend or remove them"
            )
        counts[split] = {"images": kept, "rejected": rejected}
        number = 0
        for place, part in enumerate(own):
            rejects = part.file("rejects.parquet").model_copy(update={"name": f"rejects/{split}/{place:05d}.parquet"})
            entries.append(rejects)
            if not part.file("shard.tar").rows:
                continue
            shard = part.file("shard.tar").model_copy(update={"name": f"shards/{split}/{number:05d}.tar"})
            index = part.file("index.parquet").model_copy(update={"name": index_name(shard)})
            entries += [shard, index]
            number += 1
    return tuple(entries), counts


def _labeled_per_class(store: Store, entries: Sequence[FileEntry], num_classes: int) -> list[int]:
    own = [entry for entry in entries if entry.name.startswith("index/labeled/")]
    labels = np.concatenate([table["label"].to_numpy() for table in read_tables(store, own, ["label"])])
    return [int(count) for count in np.bincount(labels, minlength=num_classes)]


def _check_class_size(config: PrepareConfig, name: str, number: int, count: int, what: str) -> None:
    if count < config.min_images_per_class:
        raise UserError(
            f"class {number} ({name}) has {count} {what}; at least data.min_images_per_class="
            f"{config.min_images_per_class} are needed. Add images, drop the class, or lower the setting"
        )
