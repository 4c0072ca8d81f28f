"""A stretch of a source -> a part of the store: tars (or the place of one that is registered where it lies), and of each
tar an index and the thumbnails that the leak guard looks at; and the rejects.

Images are read, decoded and written one at a time, and rows go to disk in batches, so memory does not grow with a tar.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.artifacts import FileEntry, Part, publish_part
from storage.images import ImageError, decode_rgb, image_extension
from storage.keys import Config, digest
from storage.objects import Store
from storage.shards import INDEX_SCHEMA, ShardSample, TableWriter, write_tar
from tasks.leaks.phash import SIDE, gray_thumbnail, hash_grays
from tasks.sources import UNKNOWN_ROWS, USUAL_BYTES, RawImage, Source, SourceFile

VERSION = 3  # of the parts; 2: a perceptual hash in the index; 3: torn tars are told, copied ones cut
STAGE = "ingest"
NO_NUMERICS: dict[str, Any] = {}
THUMBNAILS_SCHEMA = pa.schema([("thumbnail", pa.binary(SIDE * SIDE))])  # gray, row by row, in the index's order
REJECTS_SCHEMA = pa.schema([("source", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
FIRST_REJECTS = 3
SAFE_NAME = re.compile(r"[^A-Za-z0-9_-]")
KEY_NAME_CHARACTERS = 80
BATCH_ROWS = 256  # that wait in memory for a place in a table

Row = dict[str, Any]
Files = dict[str, tuple[Path, int | None]]


class Stretch(Config):
    """The rows [first, last) of a source's file, to be one part.

    Of a tar nobody knows the rows before it was read: it is a shard as it is (`in_place`), or its copy is cut into shards
    of `most_images` and, about, `most_bytes`. Every other stretch is one shard.
    """

    file: SourceFile
    first: int
    last: int
    in_place: bool = False
    most_images: int = 0
    most_bytes: int = 0

    def part_key(self) -> str:
        """Made from what enters the part, not from its number."""
        identity: dict[str, Any] = {
            "version": VERSION,
            "labeled": self.file.split != "unlabeled",
            "in_place": self.in_place,
        }
        if self.most_images:
            identity |= {"limits": (self.most_images, self.most_bytes)}
        if self.file.columns:
            identity |= {"columns": self.file.columns}
        file = (self.file.name, self.file.sha256)
        return digest({**identity, "file": file, "rows": (self.first, self.last)})

    @property
    def num_images(self) -> int:
        """Rows of the source, decodable or not; a guess by size where only reading tells."""
        if self.last != UNKNOWN_ROWS:
            return self.last - self.first
        return max(1, self.file.bytes // USUAL_BYTES)


class SourceShard(Config):
    """A tar of a part, or the one that it registered, with its index and thumbnails, row by row the same images."""

    tar: FileEntry
    index: FileEntry
    thumbnails: FileEntry


def shards_of(part: Part, location: str = "") -> list[SourceShard]:
    """The shards of a part, in order; of a registered tar, the one at `location` (a URL). The part does not say where
    that lies, so that tars may move: a rerun finds them again without reading them."""
    shards = []
    for number in range(part.facts["shards"]):
        index, thumbnails = (part.file(f"{name}-{number:05d}.parquet") for name in ("index", "thumbnails"))
        if "tar" in part.facts:
            tar = FileEntry(name="shard.tar", path=location, rows=index.rows, **part.facts["tar"])
        else:
            tar = part.file(f"shard-{number:05d}.tar")
        shards.append(SourceShard(tar=tar, index=index, thumbnails=thumbnails))
    return shards


def write_part(store: Store, stretch: Stretch, source: Source, on_read: Callable[[int], None]) -> Part:
    """Read a stretch and publish its part; `on_read` is told how many images were read so far."""
    with store.staging() as folder, _Rejects(folder) as rejects:
        images = _decoded(stretch, source, rejects, on_read)
        if stretch.in_place:
            with _Tables(folder, 0) as tables:
                for rows in _batches(row for row, _ in images):
                    tables.add(rows)
            files, num_shards = tables.files, 1
        else:
            files, num_shards = _copy(folder, stretch, images)
        facts = {"shards": num_shards, "rejects": rejects.first, "rejected": rejects.num_images}
        if stretch.in_place:
            facts["tar"] = {"bytes": stretch.file.bytes, "sha256": source.sha256(stretch.file)}
        rejects.close()
        files["rejects.parquet"] = (rejects.path, rejects.num_rows)
        return publish_part(store, STAGE, stretch.part_key(), NO_NUMERICS, files, facts)


def sample_key(name: str, row: int | None = None) -> str:
    """A sample's key: stable, unique, and free of the dots and slashes that WebDataset gives a meaning.

    `name` is that of the source's file, `row` its place there; None where the file is the image.
    """
    stem = re.sub(r"\.(parquet|tar)$", "", name) if row is not None else name.rpartition(".")[0] or name
    safe = SAFE_NAME.sub("_", stem)[-KEY_NAME_CHARACTERS:]
    if safe != stem or row is None:
        safe = f"{safe}-{digest(name)[:12]}"
    return safe if row is None else f"{safe}-{row:08d}"


def _decoded(
    stretch: Stretch, source: Source, rejects: "_Rejects", on_read: Callable[[int], None]
) -> Iterator[tuple[Row, bytes]]:
    """The images that decode: index row (with the thumbnail) and bytes."""
    images = source.read(stretch.file, stretch.first, stretch.last)
    for number, raw in enumerate(images, start=stretch.first):
        on_read(number - stretch.first)
        try:
            row = _index_row(stretch.file, number, raw)
        except ImageError as error:
            where = raw.path if raw.own_name else f"{stretch.file.name}:{raw.path}"
            rejects.add({"source": where, "row": number, "reason": str(error)}, raw.stands_for)
        else:
            yield row, raw.data


def _copy(folder: Path, stretch: Stretch, images: Iterator[tuple[Row, bytes]]) -> tuple[Files, int]:
    """Write images into tars with their tables; the files, and how many tars."""
    files: Files = {}
    number = 0
    while (first := next(images, None)) is not None:
        rows: list[Row] = []
        path = folder / f"shard-{number:05d}.tar"
        places = write_tar(path, _samples(stretch, chain([first], images), rows))
        for row, place in zip(rows, places, strict=True):
            row["offset"], row["bytes"] = next(iter(place.values()))
        with _Tables(folder, number) as tables:
            for some in _batches(rows):
                tables.add(some)
        files |= {path.name: (path, len(rows)), **tables.files}
        number += 1
    return files, number


def _samples(stretch: Stretch, images: Iterator[tuple[Row, bytes]], rows: list[Row]) -> Iterator[ShardSample]:
    """As many samples as one shard may have, for a tar; their rows are added to `rows`."""
    num_bytes = 0
    for row, data in images:
        rows.append(row)
        members = {image_extension(data): data}
        if row["label"] >= 0:
            members["cls"] = str(row["label"]).encode()
        yield ShardSample(row["key"], members)
        num_bytes += len(data)
        if stretch.most_images and (len(rows) >= stretch.most_images or num_bytes >= stretch.most_bytes):
            return


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while batch := list(islice(rest, BATCH_ROWS)):
        yield batch


class _Tables:
    """The index and the thumbnails of one shard, written as the rows come."""

    def __init__(self, folder: Path, number: int) -> None:
        names = (f"index-{number:05d}.parquet", f"thumbnails-{number:05d}.parquet")
        self._writers = [
            TableWriter(folder / name, schema)
            for name, schema in zip(names, (INDEX_SCHEMA, THUMBNAILS_SCHEMA), strict=True)
        ]

    def __enter__(self) -> "_Tables":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers:
            writer.close()

    def add(self, rows: list[Row]) -> None:
        for writer in self._writers:
            writer.write(pa.RecordBatch.from_pylist(rows, writer.schema))

    @property
    def files(self) -> Files:
        return {writer.path.name: (writer.path, writer.num_rows) for writer in self._writers}


class _Rejects(TableWriter):
    """The table of rejects, the first of them in words, and how many images they stand for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "rejects.parquet", REJECTS_SCHEMA)
        self.first: list[str] = []
        self._rows: list[Row] = []
        self.num_images = 0

    def add(self, row: Row, stands_for: int) -> None:
        self._rows.append(row)
        self.num_images += stands_for
        if len(self.first) < FIRST_REJECTS:
            self.first.append(f"{row['source']} row {row['row']}: {row['reason']}")
        if len(self._rows) == BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        super().close()

    def _flush(self) -> None:
        if self._rows:
            self.write(pa.RecordBatch.from_pylist(self._rows, self.schema))
            self._rows = []


def _index_row(file: SourceFile, number: int, raw: RawImage) -> Row:
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
