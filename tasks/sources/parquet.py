"""Parquet files in the layout of Hugging Face `datasets`: `image: struct<bytes, path>`, `label: int`, or as they name them."""

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
USUAL_COLUMNS = ("image", "label")
IMAGE_COLUMNS = ("image", "img")  # the second is CIFAR's on the Hub
LABEL_COLUMNS = ("label", "fine_label")


class ParquetFiles:
    """The Parquet files of one folder or bucket."""

    def __init__(self, root: str, folder: ExternalFolder, limits: tuple[int, int], columns: tuple[str, str]) -> None:
        """`limits`: images and bytes of a shard; `columns`: of images and labels, empty: found by name."""
        self._root, self._folder, self._limits = root, folder, limits
        self._image_column, self._label_column = columns

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
            return [str(name) for name in info["info"]["features"][_columns(file)[1]]["names"]]
        except (KeyError, ValueError, TypeError):
            return []

    def labels(self, file: SourceFile) -> np.ndarray:
        """The column of labels, int64 [rows]."""
        name = _columns(file)[1]
        with self._open(file) as reader:
            column = reader.read(columns=[name])[name]
        if column.null_count:
            raise UserError(
                f"{file.name}: {column.null_count} rows of column {name!r} are empty; every {file.split} image needs a label"
            )
        return column.to_numpy().astype(np.int64)

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """Reads only the row groups that hold the rows, `READ_ROWS` rows at a time."""
        last = file.rows if last == UNKNOWN_ROWS else last
        image, label_column = _columns(file)
        columns = [image] if file.split == "unlabeled" else [image, label_column]
        with self._open(file) as reader:
            ends = np.cumsum([reader.metadata.row_group(g).num_rows for g in range(reader.num_row_groups)])
            groups = range(
                int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last - 1, "right")) + 1
            )
            row = int(ends[groups.start - 1]) if groups.start else 0
            for batch in reader.iter_batches(READ_ROWS, row_groups=list(groups), columns=columns):
                images = batch.column(image)
                for place in range(max(0, first - row), min(len(images), last - row)):
                    value = images[place].as_py() or {}
                    label = batch.column(label_column)[place].as_py() if len(columns) == 2 else -1
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
        image = self._find_image(schema)
        if image is None:
            raise UserError(
                f"{path} has no column '{self._image_column or 'image'}: struct<bytes, path>' (it has {', '.join(schema.names)}); "
                "set data.image_column, or write it with `datasets`"
            )
        label = "" if split == "unlabeled" else self._find_label(schema)
        if label is None:
            raise UserError(
                f"{path} has no integer column '{self._label_column or 'label'}', which data.{split} needs "
                f"(it has {', '.join(schema.names)}); set data.label_column"
            )
        columns = () if (image, label or USUAL_COLUMNS[1]) == USUAL_COLUMNS else (image, label)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        cuts = cut_rows([(group.num_rows, group.total_byte_size) for group in groups], *self._limits)
        found = SourceFile(
            split=split, name=file.name, bytes=file.bytes, sha256=sha256, rows=footer.num_rows, cuts=cuts
        )
        return found.model_copy(update={"columns": columns})

    def _find_image(self, schema: pa.Schema) -> str | None:
        """The column that is asked for, has one of the usual names, or is the only one of images."""
        own = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        if self._image_column:
            return self._image_column if self._image_column in own else None
        named = [name for name in IMAGE_COLUMNS if name in own]
        return named[0] if named else own[0] if len(own) == 1 else None

    def _find_label(self, schema: pa.Schema) -> str | None:
        own = [field.name for field in schema if pa.types.is_integer(field.type)]
        return next(
            (name for name in ([self._label_column] if self._label_column else LABEL_COLUMNS) if name in own), None
        )


def _columns(file: SourceFile) -> tuple[str, str]:
    """Where a file has the images and the labels."""
    image, label = file.columns or USUAL_COLUMNS
    return image, label


def _external(file: SourceFile) -> ExternalFile:
    """The file as its folder names it."""
    tag = file.sha256.removeprefix("etag:") if file.sha256.startswith("etag:") else ""
    return ExternalFile(name=file.name, bytes=file.bytes, tag=tag)
