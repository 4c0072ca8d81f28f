"""Images of any source -> shards: WebDataset tars, or tars of others registered where they lie, with index and rejects.

A stretch of a source is a part: its key is made from what it holds, so new files leave the other parts as they are.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from models.compute import group_shards
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Part, find_part, find_parts, made_parts
from storage.backend import refuse_credentials
from storage.keys import Config, digest
from storage.objects import Store
from storage.shards import index_name
from tasks.contract import StageContext
from tasks.leaks.index import LeakConfig
from tasks.reject_limit import RejectLimit, part_facts
from tasks.source_parts import NO_NUMERICS, STAGE, Stretch, write_part
from tasks.sources import SPLITS, UNKNOWN_ROWS, Source, SourceFile
from tasks.sources.digits import DigitsConfig, DigitsSource
from tasks.sources.files import FilesSource
from tasks.sources.torchvision import TorchvisionConfig, TorchvisionSource

SHARD_BYTES = 256 << 20


class DataConfig(Config):
    """Where the images are and how they are cut into shards. The `data` part of a recipe."""

    not_in_key: ClassVar[tuple[str, ...]] = ("root", "unlabeled_root")

    source: Literal["files", "digits", "torchvision"] = Field(
        "files", description="files: Parquet, WebDataset tars or image folders, told by their names"
    )
    root: str = Field(".", description="folder or s3:// URL of the files; no part of the key")
    unlabeled_root: str = Field("", description="the same for the unlabeled files; empty: root")
    labeled: str = Field("labeled*.parquet", description="file, pattern or folder of the labeled images")
    val: str = Field("val*.parquet", description="validation images: settings are chosen on these")
    test: str = Field("test*.parquet", description="test images: reported on, never chosen on")
    unlabeled: str = Field("unlabeled*.parquet", description="images whose labels, if any, are not read")
    image_column: str = Field(
        "", description="of Parquet files; empty: `image`, `img`, or the only one that holds images"
    )
    label_column: str = Field("", description="of Parquet files; empty: `label` or `fine_label`")
    class_names: tuple[str, ...] = Field((), description="classes by label; empty: from the files")
    shard_images: int = Field(10_000, ge=1, description="images of a shard, at most")
    shard_bytes: int = Field(SHARD_BYTES, ge=1, description="bytes of a shard, about, at most")
    in_place: bool = Field(True, description="unlabeled tars are read where they lie; false: copied into the store")
    min_images_per_class: int = Field(2, ge=1, description="fewer labeled images of a class are an error")
    max_reject_fraction: float = Field(0.05, ge=0, le=1, description="more undecodable images of a split are an error")
    seed: int = Field(0, ge=0, description="of the labeled images' order")
    leaks: LeakConfig = LeakConfig()
    digits: DigitsConfig = DigitsConfig()
    torchvision: TorchvisionConfig = TorchvisionConfig()

    @field_validator("root", "unlabeled_root")
    @classmethod
    def _without_credentials(cls, root: str) -> str:
        return refuse_credentials(root, "data.root")  # before Prefect or a run record keeps it


def open_source(config: DataConfig) -> Source:
    """The source that the config names."""
    limits = config.shard_images, config.shard_bytes
    if config.source == "digits":
        return DigitsSource(config.digits, config.shard_images)
    if config.source == "torchvision":
        return TorchvisionSource(config.torchvision, config.root, limits)
    roots = dict.fromkeys(SPLITS, config.root) | {"unlabeled": config.unlabeled_root or config.root}
    patterns = {split: getattr(config, split) for split in SPLITS}
    return FilesSource(roots, patterns, config.class_names, limits, (config.image_column, config.label_column))


def fingerprint(files: Sequence[SourceFile]) -> str:
    """The identity of external data: its sorted listing, by content. Moving or touching files changes nothing."""
    return digest([file.identity() for file in files])


def plan_stretches(config: DataConfig, files: Sequence[SourceFile]) -> list[Stretch]:
    """Cut files into stretches, in their order. A tar is one."""
    stretches = []
    for file in files:
        in_place = (
            config.in_place and file.split == "unlabeled" and file.name.lower().endswith(".tar") and not file.members
        )
        if file.rows == UNKNOWN_ROWS:
            most = (0, 0) if in_place else (config.shard_images, config.shard_bytes)
            whole = Stretch(file=file, first=0, last=UNKNOWN_ROWS, in_place=in_place)
            stretches.append(whole.model_copy(update={"most_images": most[0], "most_bytes": most[1]}))
        elif file.rows:
            ends = (*file.cuts[1:], file.rows)
            stretches += [Stretch(file=file, first=a, last=b) for a, b in zip(file.cuts, ends, strict=True)]
    return stretches


def ingest(context: StageContext, config: DataConfig, stretches: Sequence[Stretch]) -> list[Part]:
    """Make the missing parts in child processes; the parts of all, in order.

    Raises UserError as soon as a split has more rejects than it may have, whatever follows.
    """
    keys = [stretch.part_key() for stretch in stretches]
    found = find_parts(context.store, STAGE, keys, NO_NUMERICS)
    missing = [stretch for stretch, key in zip(stretches, keys, strict=True) if found[key] is None]
    sizes = [stretch.num_images for stretch in missing]
    specs = [
        {
            "store": context.store.url,
            "config": config.model_dump(mode="json"),
            "stretches": [missing[place].model_dump(mode="json") for place in group],
        }
        for group in group_shards(sizes, context.engine.processes, context.compute)
    ]
    limit = RejectLimit(config.max_reject_fraction, stretches, found.values())
    context.engine.map("tasks.ingest:write_shards", specs, limit.listener(context.progress_of(sum(sizes))))
    if missing:
        found = find_parts(context.store, STAGE, keys, NO_NUMERICS)
    return made_parts(STAGE, found, keys)


def write_shards(spec: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """Worker function: make the shards of `spec["stretches"]`, each a part, and publish those that are missing."""
    store, config = Store(spec["store"]), DataConfig.model_validate(spec["config"])
    source = open_source(config)
    stretches = [Stretch.model_validate(raw) for raw in spec["stretches"]]
    done, total = 0, sum(stretch.num_images for stretch in stretches)
    for stretch in stretches:
        if worker.stop_requested:
            raise Stopped
        worker.at(f"{stretch.file.name}, rows {stretch.first} to {stretch.last}")
        part = find_part(store, STAGE, stretch.part_key(), NO_NUMERICS) or write_part(
            store,
            stretch,
            source,
            lambda read: worker.progress(min(total, done + read), total),  # noqa: B023
        )
        done += stretch.num_images
        worker.progress(done, total, last=True, made={"key": part.key, **part_facts(part)})
    worker.progress(total, total, last=True)
    return {}


def name_files(
    split: str, parts: Sequence[tuple[FileEntry, FileEntry]], rejects: Sequence[FileEntry]
) -> list[FileEntry]:
    """Shards, indices and rejects of a split under their names in a data set. A shard without images is left out.

    `parts`: tar and index of each; a shard's rows are those of its index, which may list fewer than the tar holds.
    """
    entries = [e.model_copy(update={"name": f"rejects/{split}/{n:05d}.parquet"}) for n, e in enumerate(rejects)]
    for number, (shard, index) in enumerate((shard, index) for shard, index in parts if index.rows):
        named = shard.model_copy(update={"name": f"shards/{split}/{number:05d}.tar", "rows": index.rows})
        entries += [named, index.model_copy(update={"name": index_name(named)})]
    return entries
