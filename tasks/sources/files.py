"""Files that people bring: Parquet, WebDataset tars or image files, each split of its own kind, told by the names."""

import difflib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from storage.errors import UserError
from storage.external import WILD, ExternalFile, ExternalFolder
from tasks.sources import SPLITS, RawImage, SourceFile
from tasks.sources.folders import IMAGE_SUFFIXES, ImageFolders, folder_of
from tasks.sources.parquet import ParquetFiles
from tasks.sources.tars import TarFiles

FEW = 12  # names of a folder that a message lists
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
KINDS = {"tars": (".tar",), "parquet": (".parquet",), "images": IMAGE_SUFFIXES}  # the first that a folder has counts


class FilesSource:
    """Files below a folder or `s3://` URL; each split is a file, a glob pattern, or a folder."""

    def __init__(
        self,
        roots: dict[str, str],
        patterns: dict[str, str],
        class_names: Sequence[str],
        limits: tuple[int, int],
        columns: tuple[str, str] = ("", ""),
    ) -> None:
        """`roots` and `patterns`: of each split; `class_names`: order of class folders, if not by name; `limits`: images
        and bytes of a shard; `columns`: of Parquet files, images and labels, empty: found."""
        self._patterns, self._given_names = patterns, list(class_names)
        self._roots = {s: ("data.root" if roots[s] == roots["labeled"] else f"data.{s}_root", roots[s]) for s in SPLITS}
        folders = {place: ExternalFolder(place[1], place[0]) for place in self._roots.values()}
        self._folders = {split: folders[self._roots[split]] for split in SPLITS}
        by_folder = {place: ParquetFiles(place[1], folder, limits, columns) for place, folder in folders.items()}
        self._parquet = {split: by_folder[self._roots[split]] for split in SPLITS}
        self._tars = {split: TarFiles(folder) for split, folder in self._folders.items()}
        self._images = {split: ImageFolders(folder, *limits) for split, folder in self._folders.items()}
        self._listed: dict[str, tuple[str, list[ExternalFile]]] = {}

    def files(self, splits: Sequence[str]) -> list[SourceFile]:
        """Every file of these splits. Raises UserError naming the folder, the pattern or the file and the remedy."""
        found: list[SourceFile] = []
        for split in splits:
            kind, files = self._list(split)
            if kind == "parquet":
                found += self._parquet[split].describe(split, files)
            elif kind == "tars":
                found += self._tars[split].describe(split, files)
            else:
                found += self._images[split].describe(split, files, self._labels_of(split, files))
        return found

    def class_names(self) -> list[str]:
        """Those of the labeled files: a Parquet file's metadata, or the names of the class folders."""
        kind, files = self._list("labeled")
        if kind == "images":
            return self._folder_names
        if kind == "parquet":
            return self._parquet["labeled"].class_names(self._parquet["labeled"].describe("labeled", files[:1])[0])
        return []

    def labels(self, file: SourceFile) -> np.ndarray | None:
        """The labels of a Parquet file or of class folders; those of a tar are read with its images."""
        kind = self._kind(file)
        if kind == "tars":
            return None
        return self._parquet[file.split].labels(file) if kind == "parquet" else self._images[file.split].labels(file)

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """As the kind of the file reads."""
        readers: dict[str, Any] = {"parquet": self._parquet, "tars": self._tars, "images": self._images}
        images: Iterator[RawImage] = readers[self._kind(file)][file.split].read(file, first, last)
        return images

    def location(self, file: SourceFile) -> str:
        """Where a tar lies."""
        return self._tars[file.split].location(file) if self._kind(file) == "tars" else ""

    def sha256(self, file: SourceFile) -> str:
        """The digest of a tar."""
        return self._tars[file.split].sha256(file)

    @staticmethod
    def _kind(file: SourceFile) -> str:
        if file.members:
            return "images"
        return "parquet" if file.name.lower().endswith(KINDS["parquet"]) else "tars"

    def _list(self, split: str) -> tuple[str, list[ExternalFile]]:
        """The kind and the files of a split."""
        if split not in self._listed:
            (setting, root), pattern = self._roots[split], self._patterns[split]
            if PurePosixPath(pattern).is_absolute() or "://" in pattern:
                raise UserError(f"data.{split}={pattern!r} is absolute; give it relative to {setting}={root!r}")
            self._folders[split].check()
            folder = self._folders[split]
            self._listed[split] = _of_one_kind(split, pattern, root, folder.find(pattern), folder.top())
        return self._listed[split]

    @cached_property
    def _folder_names(self) -> list[str]:
        """The classes by label. Raises UserError where `data.class_names` are not those of the folders."""
        found = sorted({folder_of(f.name, self._depth("labeled"), "labeled") for f in self._list("labeled")[1]})
        if self._given_names and sorted(self._given_names) != found:
            odd = sorted(set(found) ^ set(self._given_names))
            raise UserError(
                f"data.class_names and the class folders of data.labeled differ in {', '.join(map(repr, odd[:5]))}"
                f"{f' and {len(odd) - 5} more' if len(odd) > 5 else ''}; name each folder once, or leave class_names out"
            )
        return self._given_names or found

    def _labels_of(self, split: str, files: Sequence[ExternalFile]) -> list[int]:
        if split == "unlabeled":
            return [-1] * len(files)
        if self._list("labeled")[0] != "images":
            raise UserError(
                f"data.{split} are class folders, data.labeled are {self._list('labeled')[0]}: nothing says which folder is "
                "which label; bring both in one form"
            )
        number = {name: label for label, name in enumerate(self._folder_names)}
        labels = []
        for file in files:
            name = folder_of(file.name, self._depth(split), split)
            if name not in number:
                raise UserError(f"data.{split}: folder {name!r} ({file.name}) is no class of data.labeled")
            labels.append(number[name])
        return labels

    def _depth(self, split: str) -> int:
        """How many steps of a path are the split's own folder."""
        steps = [step for step in self._patterns[split].split("/") if step not in ("", ".")]
        return next((place for place, step in enumerate(steps) if set(step) & set(WILD)), len(steps))


def _of_one_kind(
    split: str, pattern: str, root: str, files: list[ExternalFile], top: list[str]
) -> tuple[str, list[ExternalFile]]:
    """The files that count: tars before Parquet before images, for img2dataset puts Parquet beside its tars.

    `top`: the names in `root`, for the message where nothing matches.
    """
    for file in files:
        if file.name.lower().endswith(COMPRESSED):
            raise UserError(
                f"data.{split}: {file.name} is a compressed tar, in which nothing can be read at its place; unpack it to .tar"
            )
    for kind, suffixes in KINDS.items():
        own = [file for file in files if file.name.lower().endswith(suffixes)]
        if own:
            return kind, own
    remedy = f"set data.{split} to a file, pattern or folder"
    if files:
        raise UserError(
            f"data.{split}: {len(files)} files match {pattern!r}, none of them a .parquet, a .tar or an image; {remedy}"
        )
    if pattern.strip("./") in top:
        raise UserError(f"data.{split}: folder {pattern!r} in {root} is empty; {remedy}")
    near = difflib.get_close_matches(pattern.split("/")[0], top, n=1)
    hint = f" -> did you mean {near[0]}?" if near else f"; there: {', '.join(top[:FEW])}" if top else ""
    raise UserError(f"data.{split}: nothing matches {pattern!r} in {root}{hint}; {remedy}")
