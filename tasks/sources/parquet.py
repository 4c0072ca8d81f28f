"""Parquet files in the layout of Hugging Face `datasets`: `image: struct<bytes, path>`, `label: int`."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import UserError
from storage.external import ExternalFile, ExternalFolder
from tasks.sources import UNKNOWN_ROWS, RawImage, SourceFile, cut_rows

FOOTERS_AT_ONCE = 8
READ_ROWS = 64  # rows in memory at once
READ_BUFFER = 1 << 20


class ParquetFiles:
    """The Parquet files of one folder or bucket."""

    def __init__(self, root: str, folder: ExternalFolder, shard_images: int, shard_bytes: int) -> None:
        self._root, self._folder = root, folder
        self._limits = shard_images, shard_bytes

    def describe(self, split: str, files: Sequence[ExternalFile]) -> list[SourceFile]:
        """The files with their rows. Raises UserError naming one that has not the columns."""
        fingerprints = self._folder.fingerprints(files)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return list(pool.map(lambda file, sha256: self._describe(split, file, sha256), files, fingerprints))

    def class_names(self, file: SourceFile) -> list[str]:
        """The names in a file's metadata, as `datasets` writes them."""
        schema = self._footer(_external(file)).schema.to_arrow_schema()
        try:
            info = json.loads((schema.metadata or {})[b"huggingface"])
            return [str(name) for name in info["info"]["features"]["label"]["names"]]
        except (KeyError, ValueError, TypeError):
            return []

    def labels(self, file: SourceFile) -> np.ndarray:
        """The column `label`, int64 [rows]."""
        with self._open(file) as reader:
            column = reader.read(columns=["label"])["label"]
        if column.null_count:
            raise UserError(
                f"{file.name}: {column.null_count} rows of column 'label' are empty; every {file.split} image needs a label"
            )
        return column.to_numpy().astype(np.int64)

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """Reads only the row groups that hold the rows, `READ_ROWS` rows at a time."""
        last = file.rows if last == UNKNOWN_ROWS else last
        columns = ["image"] if file.split == "unlabeled" else ["image", "label"]
        with self._open(file) as reader:
            ends = np.cumsum([reader.metadata.row_group(g).num_rows for g in range(reader.num_row_groups)])
            groups = range(
                int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last - 1, "right")) + 1
            )
            row = int(ends[groups.start - 1]) if groups.start else 0
            for batch in reader.iter_batches(READ_ROWS, row_groups=list(groups), columns=columns):
                images = batch.column("image")
                for place in range(max(0, first - row), min(len(images), last - row)):
                    value = images[place].as_py() or {}
                    label = batch.column("label")[place].as_py() if len(columns) == 2 else -1
                    yield RawImage(value.get("bytes") or b"", value.get("path") or "", label)
                row += len(images)

    @contextmanager
    def _open(self, file: SourceFile) -> Iterator[pq.ParquetFile]:
        place = _external(file)
        if self._folder.fingerprint(place) != file.sha256:
            raise UserError(f"{self._root}/{file.name} was replaced or removed since it was listed; run again")
        with (
            self._folder.local(place) as path,
            self._naming(file.name),
            pq.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False) as reader,
        ):
            yield reader

    def _footer(self, file: ExternalFile) -> pq.FileMetaData:
        with self._naming(file.name), self._folder.ranges(file) as stream:
            return pq.read_metadata(stream)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self._root}/{name} is not a readable Parquet file ({error}); replace it or leave it out of the pattern"
            ) from error

    def _describe(self, split: str, file: ExternalFile, sha256: str) -> SourceFile:
        footer = self._footer(file)
        schema, path = footer.schema.to_arrow_schema(), f"{self._root}/{file.name}"
        image = schema.field("image").type if "image" in schema.names else None
        if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise UserError(
                f"{path} has no column 'image: struct<bytes, path>' (it has {', '.join(schema.names)}); write it with `datasets`"
            )
        if split != "unlabeled" and (
            "label" not in schema.names or not pa.types.is_integer(schema.field("label").type)
        ):
            raise UserError(
                f"{path} has no integer column 'label', which data.{split} needs (it has {', '.join(schema.names)})"
            )
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        cuts = cut_rows([(group.num_rows, group.total_byte_size) for group in groups], *self._limits)
        return SourceFile(split=split, name=file.name, bytes=file.bytes, sha256=sha256, rows=footer.num_rows, cuts=cuts)


def _external(file: SourceFile) -> ExternalFile:
    """The file as its folder names it."""
    tag = file.sha256.removeprefix("etag:") if file.sha256.startswith("etag:") else ""
    return ExternalFile(name=file.name, bytes=file.bytes, tag=tag)
