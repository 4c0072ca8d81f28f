"""prepare: labeled, validation and test images of any source -> shards; the labeled ones shuffled by seed.

Shuffled in two steps, so that every source is read once and in order: first shards in the order of the source, then
the images of the labeled ones are dealt anew. (Unshuffled, class folders would make one-class shards.)
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from models.compute import group_shards
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Manifest, Part, find_part, find_parts, made_parts, publish_part
from storage.errors import UserError
from storage.images import image_extension
from storage.keys import digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardReader, ShardSample, read_tables, write_parquet, write_tar
from tasks.contract import StageContext, StageResult
from tasks.ingest import (
    DataConfig,
    ingest,
    name_files,
    open_source,
    plan_stretches,
)
from tasks.reject_limit import check_rejects
from tasks.source_parts import NO_NUMERICS, SourceShard, shards_of
from tasks.sources import LABELED_SPLITS, SourceFile, cut_rows

VERSION = 3  # 2: without the unlabeled images; keys of image folders and tars; 3: torn tars are told, copied ones cut, folders cut by names
SHUFFLE = "shuffle"


class PrepareConfig(DataConfig):
    """The data settings, of which the labeled, validation and test images depend on these."""

    not_in_key: ClassVar[tuple[str, ...]] = (*DataConfig.not_in_key, "unlabeled", "in_place", "leaks")


def prepare(context: StageContext, config: PrepareConfig, inputs: dict[str, Manifest]) -> StageResult:
    """Make the data set. Raises UserError on missing files, labels or classes, and on too many rejects."""
    source = open_source(config)
    files = source.files(LABELED_SPLITS)
    known = {file.name: source.labels(file) for file in files}
    class_names = list(config.class_names) or source.class_names()
    check_labels(config, class_names, files, {name: labels for name, labels in known.items() if labels is not None})
    stretches = plan_stretches(config, files)
    parts = ingest(context, config, stretches)
    by_split = {
        split: [part for stretch, part in zip(stretches, parts, strict=True) if stretch.file.split == split]
        for split in LABELED_SPLITS
    }
    counts = {split: check_rejects(config.max_reject_fraction, split, by_split[split]) for split in LABELED_SPLITS}
    shards = {split: [shard for part in by_split[split] for shard in shards_of(part)] for split in LABELED_SPLITS}
    labels = {split: labels_of(context.store, shards[split]) for split in LABELED_SPLITS}
    class_names = check_decoded_labels(config, class_names, labels)
    entries: list[FileEntry] = []
    for split in LABELED_SPLITS:
        rejects = [part.file("rejects.parquet") for part in by_split[split]]
        if split == "labeled":
            dealt = _shuffle(context, config, by_split[split])
            own = [(part.file("shard.tar"), part.file("index.parquet")) for part in dealt]
        else:
            own = [(shard.tar, shard.index) for shard in shards[split]]
            pictures = [shard.thumbnails for shard in shards[split] if shard.index.rows]  # for the leak guard
            entries += [
                e.model_copy(update={"name": f"thumbnails/{split}/{n:05d}.parquet"}) for n, e in enumerate(pictures)
            ]
        entries += name_files(split, own, rejects)
    per_class = [int(count) for count in np.bincount(labels["labeled"], minlength=len(class_names))]
    return StageResult(tuple(entries), {**counts, "class_names": class_names, "labeled_per_class": per_class})


def check_labels(
    config: DataConfig, class_names: list[str], files: Sequence[SourceFile], labels: dict[str, np.ndarray]
) -> None:
    """Check what is known of the labels before an image is read (of a tar nothing is). Raises UserError."""
    if len(set(class_names)) != len(class_names):
        raise UserError("data.class_names: a class name occurs twice; names must differ")
    labeled = [file for file in files if file.split == "labeled"]
    if any(file.name not in labels for file in labeled):
        return  # check_decoded_labels tells
    train = np.concatenate([labels[file.name] for file in labeled])
    if not len(train):
        raise UserError(f"data.labeled={config.labeled!r}: the files hold no rows; point it at labeled images")
    names = class_names or _numbered(
        config, max(int(found.max()) for found in labels.values() if len(found)), len(train)
    )
    for file in files:
        outside = [n for n, label in enumerate(labels.get(file.name, ())) if not 0 <= label < len(names)]
        if outside:
            raise UserError(
                f"{file.name}: row {outside[0]} has label {labels[file.name][outside[0]]}, outside the {len(names)} "
                f"classes 0..{len(names) - 1} ({len(outside)} such rows); correct the labels or data.class_names"
            )
    _check_classes(config, names, train, "images")


def check_decoded_labels(config: DataConfig, class_names: list[str], labels: dict[str, np.ndarray]) -> list[str]:
    """The class names, checked against the labels of the images that decode. Raises UserError."""
    largest = max(int(found.max()) for found in labels.values())
    names = class_names or _numbered(config, largest, len(labels["labeled"]))
    if largest >= len(names):
        split = next(split for split, found in labels.items() if int(found.max()) == largest)
        raise UserError(
            f"data.{split}: an image has label {largest}, outside the {len(names)} classes 0..{len(names) - 1}; correct "
            "the labels or data.class_names"
        )
    _check_classes(config, names, labels["labeled"], "decodable labeled images")
    return names


def shuffle_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: deal the images of `spec["sources"]` into the shards `spec["shards"]` (number -> key)."""
    store, config = Store(spec["store"]), PrepareConfig.model_validate(spec["config"])
    sources = [SourceShard.model_validate(raw) for raw in spec["sources"]]
    index, deal = _dealt(store, config, sources)
    reader = ShardReader(store, [source.tar for source in sources])
    done, total = 0, sum(len(deal[int(number)]) for number in spec["shards"])
    for number, key in spec["shards"].items():
        if worker.stop_requested:
            raise Stopped
        if find_part(store, SHUFFLE, key, NO_NUMERICS) is None:
            worker.at(f"shards/labeled/{int(number):05d}.tar")
            _write_shuffled(store, key, index.take(deal[int(number)]).to_pylist(), reader)
        done += len(deal[int(number)])
        worker.progress(done, total)
    worker.progress(total, total, last=True)
    return {}


def _shuffle(context: StageContext, config: PrepareConfig, parts: Sequence[Part]) -> list[Part]:
    """The shards of the labeled images in an order drawn by seed."""
    sources = [shard for part in parts for shard in shards_of(part)]
    _, deal = _dealt(context.store, config, sources)
    settings = [config.seed, config.shard_images, config.shard_bytes, [part.key for part in parts]]
    keys = [digest({"version": VERSION, "deal": settings, "number": number}) for number in range(len(deal))]
    found = find_parts(context.store, SHUFFLE, keys, NO_NUMERICS)
    missing = [number for number, key in enumerate(keys) if found[key] is None]
    sizes = [len(deal[number]) for number in missing]
    specs = [
        {
            "store": context.store.url,
            "config": config.model_dump(mode="json"),
            "sources": [source.model_dump(mode="json") for source in sources],
            "shards": {str(missing[place]): keys[missing[place]] for place in group},
        }
        for group in group_shards(sizes, context.engine.processes, context.compute)
    ]
    context.engine.map("tasks.prepare:shuffle_shards", specs, context.progress_of(sum(sizes)))
    if missing:
        found = find_parts(context.store, SHUFFLE, keys, NO_NUMERICS)
    return made_parts(SHUFFLE, found, keys)


def _dealt(store: Store, config: DataConfig, sources: Sequence[SourceShard]) -> tuple[pa.Table, list[np.ndarray]]:
    """The index of all images with the tar of each, and which of its rows make up each output shard."""
    tables = []
    for source, table in zip(sources, read_tables(store, [source.index for source in sources]), strict=True):
        tar = pa.array([source.tar.path] * table.num_rows, pa.string()).dictionary_encode()
        tables.append(table.append_column("shard", tar))
    index = pa.concat_tables(tables).unify_dictionaries()
    order = np.random.default_rng(config.seed).permutation(index.num_rows)
    sizes = index["bytes"].to_numpy()[order]
    cuts = cut_rows([(1, int(size)) for size in sizes], config.shard_images, config.shard_bytes)
    return index, [order[a:b] for a, b in zip(cuts, (*cuts[1:], len(order)), strict=True)]


def _write_shuffled(store: Store, key: str, rows: list[dict[str, Any]], reader: ShardReader) -> None:
    def samples() -> Iterator[ShardSample]:
        for row in rows:
            data = reader.read(row["shard"], row["offset"], row["bytes"], row["sha256"])
            yield ShardSample(row["key"], {image_extension(data): data, "cls": str(row["label"]).encode()})

    with store.staging() as folder:
        for row, place in zip(rows, write_tar(folder / "shard.tar", samples()), strict=True):
            row["offset"], row["bytes"] = next(iter(place.values()))
        write_parquet(folder / "index.parquet", pa.Table.from_pylist(rows, INDEX_SCHEMA))
        files = {name: (folder / name, len(rows)) for name in ("shard.tar", "index.parquet")}
        publish_part(store, SHUFFLE, key, NO_NUMERICS, files)


def labels_of(store: Store, shards: Sequence[SourceShard]) -> np.ndarray:
    """The labels of all images of some shards, int [images]."""
    tables = read_tables(store, [shard.index for shard in shards], ["label"])
    return np.concatenate([table["label"].to_numpy() for table in tables])


def _numbered(config: DataConfig, largest: int, num_labeled: int) -> list[str]:
    """Names for classes that have none. Raises UserError before a list of 2**63 names is made."""
    if largest >= num_labeled:
        raise UserError(
            f"data.labeled={config.labeled!r}: {num_labeled} images cannot fill the classes 0..{largest} that their labels "
            "name; number the classes from 0 without gaps, or set data.class_names"
        )
    return [str(number) for number in range(largest + 1)]


def _check_classes(config: DataConfig, names: list[str], labels: np.ndarray, what: str) -> None:
    if len(names) < 2:
        raise UserError(f"data.labeled={config.labeled!r}: found one class only; a classifier needs two or more")
    inside = labels[(labels >= 0) & (labels < len(names))]
    for number, count in enumerate(np.bincount(inside, minlength=len(names))):
        if count < config.min_images_per_class:
            where = f"{what} in data.labeled={config.labeled!r}" if what == "images" else what
            raise UserError(
                f"class {number} ({names[number]}) has {count} {where}; at least data.min_images_per_class="
                f"{config.min_images_per_class} are needed. Add images, drop the class, or lower the setting"
            )
