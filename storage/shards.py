"""WebDataset tars with a Parquet index: written byte for byte the same each time, read at random, verified.

Written with the standard library, not with `webdataset.TarWriter`: importing webdataset loads torch (half a gigabyte),
and the index needs each member's offset. The tests read these tars with webdataset.
"""

import hashlib
import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import FileEntry, Manifest
from storage.errors import DamagedObject, StoreError
from storage.objects import READ_ATTEMPTS, Store

ROW_GROUP_ROWS = 65_536
OPEN_SHARDS = 64

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # the sample's key in the tar, unique in the data set
        ("offset", pa.int64()),  # of the image's bytes in the tar
        ("bytes", pa.int64()),
        ("sha256", pa.string()),  # of the image's bytes
        ("label", pa.int32()),  # class index; -1: unlabeled
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.uint64()),  # tasks/leaks/phash.py: alike images differ in few bits
        ("source", pa.string()),  # where the image came from: file and row, or the path in its own archive
    ]
)


@dataclass(frozen=True)
class ShardSample:
    """One sample for a tar: its key and its members by extension, in the order in which they are written."""

    key: str
    members: dict[str, bytes]


def write_tar(path: Path, samples: Iterable[ShardSample]) -> list[dict[str, tuple[int, int]]]:
    """Write samples as a WebDataset tar; same samples, same bytes (no time, owner or mode of this machine).

    Returns for each sample the offset and size of each member's bytes, by extension. Raises StoreError on a key that
    would leave the folder in which somebody unpacks the tar. (Members are never unpacked here: they are read by offset.)
    """
    places: list[dict[str, tuple[int, int]]] = []
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            place = {}
            if sample.key.startswith("/") or {"..", "."} & set(sample.key.split("/")):
                raise StoreError(
                    f"{path.name}: sample key {sample.key!r} leaves the shard; keys are relative, without '..'"
                )
            for extension, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o444, 0
                tar.addfile(info, io.BytesIO(data))
                blocks = -(-len(data) // tarfile.BLOCKSIZE)
                place[extension] = (tar.offset - blocks * tarfile.BLOCKSIZE, len(data))
            places.append(place)
    return places


def write_parquet(path: Path, table: pa.Table, group_rows: int = ROW_GROUP_ROWS) -> None:
    """Write a table in the project's one Parquet form: pyarrow, zstd, fixed row groups, no machine facts."""
    pq.write_table(table, path, row_group_size=group_rows, compression="zstd")


class TableWriter:
    """As `write_parquet`, from batches of any size as they come: the row groups do not depend on them.

    Holds no more than a row group in memory. The file is whole once it was closed, as leaving the context does.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.num_rows = path, schema, 0
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(path, schema, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._waiting.append(batch)
        self._num_waiting += batch.num_rows
        self.num_rows += batch.num_rows
        if self._num_waiting < ROW_GROUP_ROWS or self._writer is None:
            return
        table = pa.Table.from_batches(self._waiting, self.schema)
        whole = self._num_waiting - self._num_waiting % ROW_GROUP_ROWS
        self._writer.write_table(table.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
        self._waiting, self._num_waiting = table.slice(whole).to_batches(), self._num_waiting - whole

    def close(self) -> None:
        """Write what waits, and the footer. A second time does nothing."""
        if self._writer is not None:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self.schema))
            self._writer.close()
            self._writer = None


def write_parquet_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """As `write_parquet`, from batches of any size: the row groups do not depend on them. Returns the rows."""
    with TableWriter(path, schema) as writer:
        for batch in batches:
            writer.write(batch)
    return writer.num_rows


class ShardReader:
    """Random reads of samples from the tars of artifacts, each verified. Make one a process.

    A bucket's tars are read from this machine's cache (`whole`), or by ranges: for a few samples of many tars, or where
    the tars would fill the cache. Left out, `whole` is chosen by size. Keeps at most `OPEN_SHARDS` files open.
    """

    def __init__(self, store: Store, shards: Iterable[FileEntry], whole: bool | None = None) -> None:
        self._store = store
        self._shards = {shard.path: shard for shard in shards}
        total = sum(shard.bytes for shard in self._shards.values())
        self._whole = whole or store.on_disk(self._shards.values()) or (whole is None and store.fits_local(total))
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, size: int, sha256: str) -> bytes:
        """The `size` bytes at `offset` of the tar at `path`, with that sha256.

        A bad copy in the cache is fetched again. Raises StoreError naming the tar where it is missing, short or altered.
        """
        for _ in range(READ_ATTEMPTS):
            data = self._read(path, offset, size)
            if len(data) == size and hashlib.sha256(data).hexdigest() == sha256:
                return data
            self._close(path)
            if self._whole and not self._store.forget_local(self._shards[path]):
                break
        raise DamagedObject(f"shard {path} is damaged: the {size} bytes at {offset} are not what its index says")

    def stream(self, path: str, places: Iterable[tuple[int, int, str]]) -> Iterator[bytes]:
        """The bytes at many places (offset, size, sha256) of one tar, with rising offsets, in one pass over it.

        A bucket's tar is read through in blocks and not kept, unless it is to be kept on this machine anyway.
        """
        if self._whole:
            yield from (self.read(path, *place) for place in places)
            return
        blocks, start, window = self._store.blocks(self._shards[path]), 0, b""
        for offset, size, sha256 in places:
            pieces = []  # a sample may lie across blocks
            while start + len(window) < offset + size:
                pieces.append(window[max(0, offset - start) :])
                start, window = start + len(window), next(blocks, b"")
                if not window:
                    break
            pieces.append(window[max(0, offset - start) : max(0, offset + size - start)])
            data = b"".join(pieces)
            if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
                data = self.read(path, offset, size, sha256)  # again, from the store: a byte may have been flipped
            yield data

    def close(self) -> None:
        """Close all files."""
        for path in list(self._open):
            self._close(path)

    def _read(self, path: str, offset: int, size: int) -> bytes:
        if not self._whole:
            return self._store.read_range(path, offset, size)
        handle = self._open.pop(path, None)
        if handle is None:
            handle = self._store.open_local(self._shards[path])
        self._open[path] = handle
        while len(self._open) > 1 and (len(self._open) > OPEN_SHARDS or self._open_bytes() > self._store.open_bytes()):
            self._close(next(iter(self._open)))
        return os.pread(handle, size, offset)

    def _open_bytes(self) -> int:
        return sum(self._shards[path].bytes for path in self._open)

    def _close(self, path: str) -> None:
        handle = self._open.pop(path, None)
        if handle is not None:
            os.close(handle)


def shard_files(manifest: Manifest, split: str) -> tuple[FileEntry, ...]:
    """The tars of a split, in order. Raises StoreError where the split is not there."""
    files = manifest.files_under(f"shards/{split}/")
    if not files:
        raise StoreError(f"{manifest.kind} {manifest.key} has no split {split!r}")
    return files


def index_name(shard: FileEntry) -> str:
    """The logical name of a tar's index: `shards/val/00000.tar` -> `index/val/00000.parquet`."""
    return shard.name.replace("shards/", "index/", 1).removesuffix(".tar") + ".parquet"


def read_index(
    store: Store,
    manifest: Manifest,
    split: str,
    columns: Sequence[str] | None = None,
    shards: Sequence[FileEntry] | None = None,
) -> pa.Table:
    """The index of a split, or of some of its shards: in order, with a column `shard` (dictionary of object paths)."""
    shards = shard_files(manifest, split) if shards is None else shards
    tables = []
    found = read_tables(store, manifest.files_named(index_name(shard) for shard in shards), columns)
    for shard, table in zip(shards, found, strict=True):
        paths = pa.array([shard.path]).dictionary_encode()
        column = pa.DictionaryArray.from_arrays(pa.array([0] * table.num_rows, pa.int32()), paths.dictionary)
        tables.append(table.append_column("shard", column))
    return pa.concat_tables(tables).unify_dictionaries()


def read_table(store: Store, entry: FileEntry, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of an artifact, verified. Raises StoreError naming it where it is missing or damaged."""
    return read_tables(store, [entry], columns)[0]


def read_tables(store: Store, entries: Sequence[FileEntry], columns: Sequence[str] | None = None) -> list[pa.Table]:
    """Parquet files of artifacts, verified, in their order; those of a bucket are fetched side by side."""
    tables = []
    with store.local_copies(entries) as paths:
        for entry, path in zip(entries, paths, strict=True):
            try:
                tables.append(pq.read_table(path, columns=list(columns) if columns else None, partitioning=None))
            except (OSError, pa.ArrowException) as error:
                raise StoreError(f"{entry.path} cannot be read as Parquet ({error})") from error
    return tables


def read_batches(store: Store, entry: FileEntry, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, some at a time. Raises StoreError as `read_tables` does."""
    with store.local_copy(entry) as path:
        try:
            with pq.ParquetFile(path) as reader:
                yield from reader.iter_batches(batch_rows)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{entry.path} cannot be read as Parquet ({error})") from error


def read_rows(store: Store, entry: FileEntry, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
    """Some rows (int64, in any order, repeated or not) of a Parquet file that `write_parquet` wrote, in their order.

    Only the row groups that hold them are read. Raises StoreError as `read_tables` does.
    """
    with store.local_copy(entry) as path:
        try:
            with pq.ParquetFile(path) as reader:
                size = reader.metadata.row_group(0).num_rows if reader.num_row_groups else 1
                groups, group_of = np.unique(rows // size, return_inverse=True)
                table = reader.read_row_groups(groups.tolist(), columns=list(columns) if columns else None)
                return table.take(pa.array(group_of * size + rows % size))
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{entry.path} cannot be read as Parquet ({error})") from error


def npy_bytes(array: Any) -> bytes:
    """A numpy array in the `.npy` format that webdataset decodes."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
