"""Where images come from: one file a kind of source, and the form that they share.

A source lists its files by split with a fingerprint, gives the labels of a file where that needs no reading of images,
and reads the images of a stretch of rows in order. Everything else (shards, checks, rejects) is the same for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from storage.keys import Config

LABELED_SPLITS = ("labeled", "val", "test")
SPLITS = (*LABELED_SPLITS, "unlabeled")
UNKNOWN_ROWS = -1  # only reading tells how many
USUAL_BYTES = 50_000  # of an image, where nothing better is known than that it is one


@dataclass(frozen=True, slots=True)  # a listing has millions: a pydantic model takes three times the memory
class Member:
    """One image file of a listing: its path below the root, size, fingerprint and label (-1: none)."""

    name: str
    bytes: int
    sha256: str
    label: int = -1


class SourceFile(Config):
    """One file of a source, or a stretch of a listing of image files: what a worker needs to read it.

    `sha256` is its fingerprint; `cuts` are the rows at which its shards begin; `columns` where a table has the images and
    the labels, empty: `image` and `label`.
    """

    split: str
    name: str
    bytes: int
    sha256: str
    rows: int
    cuts: tuple[int, ...] = (0,)
    columns: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What tells it from other files: not how it is cut and read."""
        return self.model_dump(exclude={"cuts", "columns", "members"})


@dataclass(slots=True)
class RawImage:
    """An image as its source has it.

    `data`: its bytes; `path`: the name that the source gives it; `label`: -1 without one; `offset`: of its bytes in the
    source's file, where it lies there as it is; `problem`: why there are no bytes; `own_name`: where it is a file;
    `stands_for`: how many images a problem has lost.
    """

    data: bytes
    path: str
    label: int = -1
    offset: int = -1
    problem: str = ""
    own_name: str = ""
    stands_for: int = 1


class Source(Protocol):
    """What a kind of source must offer."""

    def files(self, splits: Sequence[str]) -> list[SourceFile]:
        """The files of some splits, by split and name. Raises UserError where one is missing or of the wrong form."""
        ...

    def class_names(self) -> list[str]:
        """The classes by label, from the source's own metadata; empty where it has none."""
        ...

    def labels(self, file: SourceFile) -> np.ndarray | None:
        """The labels of a labeled file, int64 [rows]; None where only reading the images tells."""
        ...

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """The images of the rows [first, last), in order, one at a time; `last` may be UNKNOWN_ROWS: to the end."""
        ...

    def location(self, file: SourceFile) -> str:
        """The URL of a file whose images can be read where they lie; empty where they cannot."""
        ...

    def sha256(self, file: SourceFile) -> str:
        """The digest of such a file, once it was read to its end."""
        ...


def cut_rows(sizes: Sequence[tuple[int, int]], most_rows: int, most_bytes: int) -> tuple[int, ...]:
    """Where shards begin in a file of blocks of (rows, bytes): none longer than `most_rows`, nor than `most_bytes` by
    the mean size of an image in its block."""
    cuts, rows, held, at = [0], 0, 0.0, 0
    for block_rows, block_bytes in sizes:
        left, mean = block_rows, block_bytes / max(1, block_rows)
        while left:
            room = min(most_rows - rows, int((most_bytes - held) // mean) if mean else left)
            if room <= 0 and rows:
                cuts.append(at)
                rows, held = 0, 0.0
                continue
            taken = min(left, max(1, room))
            rows, held, at, left = rows + taken, held + taken * mean, at + taken, left - taken
    return tuple(cuts)
