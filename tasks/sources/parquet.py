"""Parquet files in the layout of Hugging Face `datasets`: `image: struct<bytes, path>`, `label: int`."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import UserError
from storage.external import ExternalFile, ExternalFolder
from tasks.sources import SPLITS, RawImage, SourceFile

FOOTERS_AT_ONCE = 8


class ParquetSource:
    """Files below `root` (a folder or an `s3://` URL); each split is a file, a glob pattern, or a folder."""

    def __init__(self, root: str, patterns: dict[str, str]) -> None:
        self._root = root
        self._folder = ExternalFolder(root, "data.root")
        self._patterns = patterns

    def files(self) -> list[SourceFile]:
        """Every split's files. Raises UserError naming the folder, the pattern or the file and the remedy."""
        self._folder.check()
        found = [(split, file) for split in SPLITS for file in self._found[split]]
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return list(pool.map(lambda place: self._describe(*place), found))

    def class_names(self) -> list[str]:
        """The names in the first labeled file's metadata, as `datasets` writes them."""
        schema = self._footer(self._found["labeled"][0]).schema.to_arrow_schema()
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

    def read(self, file: SourceFile, rows: Sequence[int]) -> Iterator[RawImage]:
        """Reads only the row groups that hold the rows, one at a time."""
        with self._open(file) as reader:
            ends = np.cumsum([reader.metadata.row_group(g).num_rows for g in range(reader.num_row_groups)])
            groups = np.searchsorted(ends, np.asarray(rows), side="right")
            loaded, images = -1, None
            for row, group in zip(rows, groups, strict=True):
                if group != loaded:
                    loaded, images = (
                        group,
                        reader.read_row_group(int(group), columns=["image"])["image"].combine_chunks(),
                    )
                assert images is not None  # set with `loaded`
                value = images[int(row - (ends[group - 1] if group else 0))].as_py() or {}
                yield RawImage(data=value.get("bytes") or b"", path=value.get("path") or "")

    @cached_property
    def _found(self) -> dict[str, list[ExternalFile]]:
        """The files of each split. Raises UserError where one has none."""
        found = {}
        for split in SPLITS:
            pattern = self._patterns[split]
            if PurePosixPath(pattern).is_absolute():
                raise UserError(f"data.{split}={pattern!r} is absolute; give it relative to data.root={self._root!r}")
            found[split] = self._folder.find(pattern, ".parquet")
            if not found[split]:
                raise UserError(
                    f"data.{split}: nothing matches {pattern!r} in {self._root}; set data.{split} to a file, pattern or folder"
                )
        return found

    @contextmanager
    def _open(self, file: SourceFile) -> Iterator[pq.ParquetFile]:
        place = next((found for found in self._found[file.split] if found.name == file.name), None)
        if place is None or place.bytes != file.bytes or (place.tag and self._folder.fingerprint(place) != file.sha256):
            raise UserError(f"{self._root}/{file.name} was replaced or removed since it was listed; run again")
        with self._folder.local(place) as path, self._naming(place.name), pq.ParquetFile(path) as reader:
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

    def _describe(self, split: str, file: ExternalFile) -> SourceFile:
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
        sha256 = self._folder.fingerprint(file)
        return SourceFile(split=split, name=file.name, bytes=file.bytes, sha256=sha256, rows=footer.num_rows)
