"""Images of any source -> shards: WebDataset tars, or tars of others registered where they lie, with index and rejects.

A shard is a part: its key is made from the stretch of the source that it holds, so new files leave the others as they
are. Images are read, decoded and written one at a time, so memory does not grow with a shard.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from models.compute import group_shards
from models.worker import Stopped, Worker
from storage.artifacts import FileEntry, Part, find_part, find_parts, made_parts, publish_part
from storage.backend import refuse_credentials
from storage.errors import UserError
from storage.images import ImageError, decode_rgb, image_extension
from storage.keys import Config, digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardSample, index_name, write_parquet, write_tar
from tasks.contract import StageContext
from tasks.leaks.index import LeakConfig
from tasks.leaks.phash import SIDE, gray_thumbnail, hash_grays
from tasks.sources import SPLITS, UNKNOWN_ROWS, USUAL_BYTES, RawImage, Source, SourceFile
from tasks.sources.digits import DigitsConfig, DigitsSource
from tasks.sources.files import FilesSource
from tasks.sources.torchvision import TorchvisionConfig, TorchvisionSource

VERSION = 3  # of the parts; 2: a perceptual hash in the index; 3: torn tars are told, with what they lost
STAGE = "ingest"
NO_NUMERICS: dict[str, Any] = {}
THUMBNAILS_SCHEMA = pa.schema([("thumbnail", pa.binary(SIDE * SIDE))])  # gray, row by row, in the index's order
REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
FIRST_REJECTS = 3
SAFE_NAME = re.compile(r"[^A-Za-z0-9_-]")
KEY_NAME_CHARACTERS = 80
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


class Stretch(Config):
    """One shard to be: the rows [first, last) of a source's file; `in_place`: the file itself is the shard."""

    file: SourceFile
    first: int
    last: int
    in_place: bool = False

    def part_key(self) -> str:
        """Made from what enters the shard, not from its number."""
        identity = {"version": VERSION, "labeled": self.file.split != "unlabeled", "in_place": self.in_place}
        file = (self.file.name, self.file.sha256)
        return digest({**identity, "file": file, "rows": (self.first, self.last)})

    @property
    def num_images(self) -> int:
        """Rows of the source, decodable or not; a guess by size where only reading tells."""
        if self.last != UNKNOWN_ROWS:
            return self.last - self.first
        return max(1, self.file.bytes // USUAL_BYTES)


def open_source(config: DataConfig) -> Source:
    """The source that the config names."""
    limits = config.shard_images, config.shard_bytes
    if config.source == "digits":
        return DigitsSource(config.digits, config.shard_images)
    if config.source == "torchvision":
        return TorchvisionSource(config.torchvision, config.root, limits)
    roots = dict.fromkeys(SPLITS, config.root) | {"unlabeled": config.unlabeled_root or config.root}
    return FilesSource(roots, {split: getattr(config, split) for split in SPLITS}, config.class_names, limits)


def fingerprint(files: Sequence[SourceFile]) -> str:
    """The identity of external data: its sorted listing, by content. Moving or touching files changes nothing."""
    return digest([file.identity() for file in files])


def plan_stretches(config: DataConfig, files: Sequence[SourceFile]) -> list[Stretch]:
    """Cut files into shards, in their order. A tar is a shard as it is."""
    stretches = []
    for file in files:
        in_place = config.in_place and file.split == "unlabeled" and file.name.endswith(".tar") and not file.members
        if file.rows == UNKNOWN_ROWS:
            stretches.append(Stretch(file=file, first=0, last=UNKNOWN_ROWS, in_place=in_place))
        elif file.rows:
            ends = (*file.cuts[1:], file.rows)
            stretches += [Stretch(file=file, first=a, last=b) for a, b in zip(file.cuts, ends, strict=True)]
    return stretches


def ingest(context: StageContext, config: DataConfig, stretches: Sequence[Stretch]) -> list[Part]:
    """Make the missing shards in child processes; the parts of all, in order."""
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
    context.engine.map("tasks.ingest:write_shards", specs, context.progress_of(sum(sizes)))
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
        if find_part(store, STAGE, stretch.part_key(), NO_NUMERICS) is None:
            _write_shard(store, stretch, source, lambda read: worker.progress(min(total, done + read), total))  # noqa: B023
        done += stretch.num_images
        worker.progress(done, total)
    worker.progress(total, total, last=True)
    return {}


def sample_key(name: str, row: int | None = None) -> str:
    """A sample's key: stable, unique, and free of the dots and slashes that WebDataset gives a meaning.

    `name` is that of the source's file, `row` its place there; None where the file is the image.
    """
    stem = re.sub(r"\.(parquet|tar)$", "", name) if row is not None else name.rpartition(".")[0] or name
    safe = SAFE_NAME.sub("_", stem)[-KEY_NAME_CHARACTERS:]
    if safe != stem or row is None:
        safe = f"{safe}-{digest(name)[:12]}"
    return safe if row is None else f"{safe}-{row:08d}"


def check_rejects(config: DataConfig, split: str, parts: Sequence[Part]) -> dict[str, int]:
    """The counts of a split's images and rejects. Raises UserError on too many rejects, and where nothing is left.

    A torn tar is one row of the rejects and counts as all the images that it lost, by estimate.
    """
    kept = sum(part.file("index.parquet").rows or 0 for part in parts)
    rejected = sum(part.facts["rejected"] for part in parts)
    if rejected > config.max_reject_fraction * (kept + rejected) or not kept:
        first = "; ".join([reason for part in parts for reason in part.facts["rejects"]][:FIRST_REJECTS])
        raise UserError(
            f"data.{split}: {rejected} of {kept + rejected} images cannot be decoded, more than "
            f"data.max_reject_fraction={config.max_reject_fraction} allows ({first or 'the files hold no rows'}); mend or remove them"
        )
    return {"images": kept, "rejected": rejected}


def shard_entry(part: Part, location: str = "") -> FileEntry:
    """The tar of a part: its own, or the one at `location` (a URL) that it registered. The part does not say where that
    lies, so that tars may move: a rerun finds them again without reading them."""
    if not location:
        return part.file("shard.tar")
    tar = part.facts["tar"]
    rows = part.file("index.parquet").rows
    return FileEntry(name="shard.tar", path=location, bytes=tar["bytes"], sha256=tar["sha256"], rows=rows)


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


def _write_shard(store: Store, stretch: Stretch, source: Source, on_read: Any) -> None:
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    rejected = 0

    def samples() -> Iterator[ShardSample]:
        nonlocal rejected
        images = source.read(stretch.file, stretch.first, stretch.last)
        for number, raw in enumerate(images, start=stretch.first):
            try:
                row = _index_row(stretch.file, number, raw)
            except ImageError as error:
                where = raw.path if raw.own_name else f"{stretch.file.name}:{raw.path}"
                rejects.append({"source": where, "row": number, "reason": str(error)})
                rejected += raw.stands_for
                continue
            on_read(len(rows))
            rows.append(row)
            members = {image_extension(raw.data): raw.data}
            if row["label"] >= 0:
                members["cls"] = str(row["label"]).encode()
            yield ShardSample(row["key"], members)

    with store.staging() as folder:
        files: dict[str, tuple[Path, int | None]] = {}
        if stretch.in_place:
            for _ in samples():
                pass
        else:
            places = write_tar(folder / "shard.tar", samples())
            for row, place in zip(rows, places, strict=True):
                row["offset"], row["bytes"] = next(iter(place.values()))
            files["shard.tar"] = (folder / "shard.tar", len(rows))
        facts: dict[str, Any] = {
            "rejects": [f"{r['source']} row {r['row']}: {r['reason']}" for r in rejects[:FIRST_REJECTS]],
            "rejected": rejected,
        }
        if stretch.in_place:
            facts["tar"] = {"bytes": stretch.file.bytes, "sha256": source.sha256(stretch.file)}
        files |= _write_tables(folder, rows, rejects)
        publish_part(store, STAGE, stretch.part_key(), NO_NUMERICS, files, facts)


def _write_tables(
    folder: Path, rows: list[dict[str, Any]], rejects: list[dict[str, Any]]
) -> dict[str, tuple[Path, int | None]]:
    write_parquet(folder / "index.parquet", pa.Table.from_pylist(rows, INDEX_SCHEMA))
    write_parquet(folder / "rejects.parquet", pa.Table.from_pylist(rejects, REJECTS_SCHEMA))
    write_parquet(folder / "thumbnails.parquet", pa.Table.from_pylist(rows, THUMBNAILS_SCHEMA))
    return {
        "thumbnails.parquet": (folder / "thumbnails.parquet", len(rows)),
        "index.parquet": (folder / "index.parquet", len(rows)),
        "rejects.parquet": (folder / "rejects.parquet", len(rejects)),
    }


def _index_row(file: SourceFile, number: int, raw: RawImage) -> dict[str, Any]:
    """The index row of an image that decodes. Raises ImageError with the reason where it does not."""
    if raw.problem:
        raise ImageError(raw.problem)
    image = decode_rgb(raw.data)
    thumbnail = gray_thumbnail(image)
    return {
        "key": sample_key(raw.own_name) if raw.own_name else sample_key(file.name, number),
        "offset": raw.offset,
        "bytes": len(raw.data),
        "sha256": hashlib.sha256(raw.data).hexdigest(),
        "label": raw.label,
        "width": image.width,
        "height": image.height,
        "phash": int(hash_grays(thumbnail[None])[0]),
        "thumbnail": thumbnail.tobytes(),
        "source": raw.own_name or (f"{file.name}:{raw.path}" if raw.path else f"{file.name}:{number}"),
    }
