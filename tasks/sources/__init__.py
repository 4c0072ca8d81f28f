"""Where images come from: one file a kind of source, and the table of them.

A source lists its files by split with a fingerprint, gives the labels of a file without reading images, and reads
rows. Everything else (shards, checks, rejects) is the same for all.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from storage.keys import Config

SPLITS = ("labeled", "val", "test", "unlabeled")


class SourceFile(Config):
    """One file of a source: its split, its name below the root, and a fingerprint of its content."""

    split: str
    name: str
    bytes: int
    sha256: str
    rows: int


class RawImage(Config):
    """An image's bytes as they came, and the path that its source gave it."""

    data: bytes
    path: str


class Source(Protocol):
    """What a kind of source must offer."""

    def files(self) -> list[SourceFile]:
        """All files, sorted by split and name. Raises UserError where something is missing or of the wrong form."""
        ...

    def class_names(self) -> list[str]:
        """The classes by label, from the source's own metadata; empty where it has none."""
        ...

    def labels(self, file: SourceFile) -> np.ndarray:
        """The labels of a labeled file, int64 [rows]."""
        ...

    def read(self, file: SourceFile, rows: Sequence[int]) -> Iterator[RawImage]:
        """The images of these rows, in the order asked for."""
        ...
