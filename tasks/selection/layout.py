"""The order in which copies are written: one global shuffle, by a distribution sort on local disk.

A copy's place is that of its 64-bit draw among all draws. Copies go to buckets by the highest bits of their draw; each
bucket is sorted in memory; the sorted stream is cut into layout files that hold whole output shards. Memory is that of
a few buckets; disk is 16 bytes a copy, and for the layout itself about 5.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.shards import ROW_GROUP_ROWS
from tasks.selection.chance import ORDER, draw, splitmix64
from tasks.selection.scan import Batch, in_order

COPY_BITS = 24  # a copy is named by one number: the image's row among all, then 24 bits of copy number
BUCKET_COPIES = 1 << 20
PIECE_COPIES = 1 << 20
MOST_BUCKETS = 256  # files open at once
LAYOUT_COPIES = 1 << 20  # of a layout file, about


def draw_copies(batch: Batch, copies: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The copies to write of these predictions: their draws and their names, both uint64 [n], n <= PIECE_COPIES.

    More than one piece where images have very many copies; at least one.
    """
    images = draw(batch.key_hashes, seed, ORDER)
    ends = np.cumsum(copies, dtype=np.int64)
    begins = ends - copies
    for start in range(0, max(1, int(copies.sum(dtype=np.int64))), PIECE_COPIES):
        stop = start + PIECE_COPIES
        rows = np.repeat(np.arange(len(batch)), np.clip(ends, start, stop) - np.clip(begins, start, stop))
        number = (np.arange(start, start + len(rows)) - begins[rows]).astype(np.uint64)
        names = ((batch.first_image + rows).astype(np.uint64) << np.uint64(COPY_BITS)) | number
        yield splitmix64(images[rows] + number), names


def shards_of_file(shard_images: int) -> int:
    """How many output shards a layout file holds."""
    return max(1, LAYOUT_COPIES // shard_images)


class Shuffle:
    """Copies in, layout files out. Used as a context: `scratch` holds the buckets meanwhile."""

    def __init__(self, scratch: Path, expected: int, bucket_copies: int = BUCKET_COPIES) -> None:
        """`expected`: about how many copies there will be."""
        wanted = min(MOST_BUCKETS, max(1, -(-expected // bucket_copies)))
        self._bits = (wanted - 1).bit_length()
        self._paths = [scratch / f"bucket-{number:03d}" for number in range(1 << self._bits)]
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._streams = [self._open.enter_context(path.open("wb")) for path in self._paths]
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def split(self, draws: np.ndarray, names: np.ndarray) -> list[np.ndarray]:
        """Copies by bucket, to be handed to `add`; may run in any thread."""
        bucket = (draws >> np.uint64(63 - self._bits) >> np.uint64(1)).astype(np.uint8)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._paths)))
        return np.split(np.column_stack([draws[order], names[order]]), ends[:-1])

    def add(self, by_bucket: Sequence[np.ndarray]) -> None:
        """Take split copies."""
        for stream, copies in zip(self._streams, by_bucket, strict=True):
            stream.write(copies.data)

    def write(self, folder: Path, shard_images: int) -> list[tuple[Path, int]]:
        """Write the layout files, `shards_of_file` shards each but the last: [(path, rows)].

        A row a copy in the order of writing: image, int64, its row among all labeled images; copy, int32.
        """
        self._open.close()
        rows = shards_of_file(shard_images) * shard_images
        files: list[tuple[Path, int]] = []
        for names in _cut(in_order(_sorted, self._paths), rows):
            path = folder / f"{len(files):05d}.parquet"
            images = (names >> np.uint64(COPY_BITS)).astype(np.int64)
            copies = (names & np.uint64((1 << COPY_BITS) - 1)).astype(np.int32)
            pq.write_table(
                pa.table({"image": images, "copy": copies}),
                path,
                row_group_size=ROW_GROUP_ROWS,
                compression="zstd",
                use_dictionary=False,
                use_byte_stream_split=True,  # random numbers: twice as fast and a tenth smaller than dictionaries
            )
            files.append((path, len(names)))
        return files


def _sorted(path: Path) -> np.ndarray:
    """The names of a bucket's copies in the order of their draws."""
    draws, names = np.fromfile(path, np.uint64).reshape(-1, 2).T
    path.unlink()
    order = np.argsort(draws)
    found = draws[order]
    if (found[1:] == found[:-1]).any():  # once in 2^64 pairs; the sort above leaves them in any order
        order = np.lexsort((names, draws))
    return names[order]


def _cut(pieces: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same numbers in pieces of `rows`, the last one shorter."""
    waiting = np.empty(0, np.uint64)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece])
        while len(waiting) >= rows:
            yield waiting[:rows]
            waiting = waiting[rows:]
    if len(waiting):
        yield waiting
