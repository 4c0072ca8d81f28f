"""Parquet files in the layout of Hugging Face `datasets`: `image: struct<bytes, path>`, `label: int`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import UserError
from storage.keys import file_sha256
from tasks.sources import SPLITS, RawImage, SourceFile


class ParquetSource:
    """Files below `root`; each split is a glob pattern or a folder, in which every `*.parquet` counts."""

    def __init__(self, root: str, patterns: dict[str, str]) -> None:
        self._root = Path(root).expanduser()
        self._patterns = patterns

    def files(self) -> list[SourceFile]:
        """Every split's files. Raises UserError naming the folder, the pattern or the file and the remedy."""
        if not self._root.is_dir():
            raise UserError(
                f"data.root: folder {self._root} does not exist; set data.root=FOLDER to where the images are"
            )
        return [self._describe(split, path) for split in SPLITS for path in self._matches(split)]

    def class_names(self) -> list[str]:
        """The names in the first labeled file's metadata, as `datasets` writes them."""
        schema = self._open(self._matches("labeled")[0]).schema_arrow
        try:
            info = json.loads((schema.metadata or {})[b"huggingface"])
            return [str(name) for name in info["info"]["features"]["label"]["names"]]
        except (KeyError, ValueError, TypeError):
            return []

    def labels(self, file: SourceFile) -> np.ndarray:
        """The column `label`, int64 [rows]."""
        column = self._open(self._root / file.name).read(columns=["label"])["label"]
        if column.null_count:
            raise UserError(
                f"{file.name}: {column.null_count} rows of column 'label' are empty; every {file.split} image needs a label"
            )
        return column.to_numpy().astype(np.int64)

    def read(self, file: SourceFile, rows: Sequence[int]) -> Iterator[RawImage]:
        """Reads only the row groups that hold the rows, one at a time."""
        reader = self._open(self._root / file.name)
        ends = np.cumsum([reader.metadata.row_group(g).num_rows for g in range(reader.num_row_groups)])
        groups = np.searchsorted(ends, np.asarray(rows), side="right")
        loaded, images = -1, None
        for row, group in zip(rows, groups, strict=True):
            if group != loaded:
                loaded, images = group, reader.read_row_group(int(group), columns=["image"])["image"].combine_chunks()
            assert images is not None  # set with `loaded`
            value = images[int(row - (ends[group - 1] if group else 0))].as_py() or {}
            yield RawImage(data=value.get("bytes") or b"", path=value.get("path") or "")

    def _matches(self, split: str) -> list[Path]:
        pattern = self._patterns[split]
        place = self._root / pattern
        if Path(pattern).is_absolute():
            raise UserError(f"data.{split}={pattern!r} is absolute; give it relative to data.root={str(self._root)!r}")
        if not pattern:
            found = []
        elif place.is_file():  # its name may hold what a pattern gives a meaning, such as [ and ]
            found = [place]
        else:
            found = sorted(place.rglob("*.parquet") if place.is_dir() else self._root.glob(pattern))
        if not found:
            raise UserError(
                f"data.{split}: nothing matches {pattern!r} in {self._root}; set data.{split} to a file, pattern or folder"
            )
        return found

    def _open(self, path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is not a readable Parquet file ({error}); replace it or leave it out of the pattern"
            ) from error

    def _describe(self, split: str, path: Path) -> SourceFile:
        schema = self._open(path).schema_arrow
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
        name = path.relative_to(self._root).as_posix()
        rows = self._open(path).metadata.num_rows
        return SourceFile(split=split, name=name, bytes=path.stat().st_size, sha256=file_sha256(path), rows=rows)
