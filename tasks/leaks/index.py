"""The leak guard: evaluation images that hide in the unlabeled set, as they are or slightly altered.

The work lies on the side of the 10^4 to 10^5 evaluation images, so that the 10^8 others stream past at little cost. Of each
evaluation image an index holds a small gray picture and the hashes of 121 crops of it; of an unlabeled image one hash is
looked up, and that of its mirror image. What is within a few bits is laid over the evaluation image and compared by pixels.
`benchmarks/leak_guard.py` plants copies of every kind and counts what is found and what is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from storage.keys import Config
from tasks.leaks.alignment import align, box_maps, detail, likeness, plausible
from tasks.leaks.hamming import HammingIndex
from tasks.leaks.phash import COSINES, FREQUENCIES, MIRRORING, SIDE, hash_spectra, spectra

INDEX_SCHEMA = pa.schema([("key", pa.string()), ("sha256", pa.string()), ("thumbnail", pa.binary(SIDE * SIDE))])
LEAKS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("evaluation_key", pa.string()),
        ("kind", pa.string()),
        ("distance", pa.float32()),
        ("offset", pa.int64()),  # of the unlabeled image's bytes in its shard, for those who look at the pairs
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
# (start, length) of the parts of a side whose crops are hashed: every part of 0.8 and more is near one of them.
PARTS = ((0, 1), *((n * 0.06, 0.94) for n in range(2)), *((n * 0.06, 0.88) for n in range(3)))
PARTS = (*PARTS, *((n * 0.05, 0.8) for n in range(5)))
BOXES = np.array([(x, y, x + width, y + height) for (y, height), (x, width) in product(PARTS, PARTS)])
# What stretches a part of a side to the whole, by linear interpolation: float32 [parts, SIDE, SIDE]; and its spectrum.
PLACES = np.array([start + length * (np.arange(SIDE) + 0.5) / SIDE for start, length in PARTS]) * SIDE - 0.5
STRETCHING = np.maximum(0, 1 - np.abs(PLACES.clip(0, SIDE - 1)[:, :, None] - np.arange(SIDE))).astype(np.float32)
PART_COSINES = (COSINES @ STRETCHING).astype(np.float32)
BOX_NUMBERS = np.arange(len(BOXES))  # the first is the whole picture
LEAST_DETAIL = 2.0  # gray levels; below, what JPEG adds is as strong as what is there, and all skies look alike
LEAST_LIKENESS = 0.4  # before alignment: all but 2 in 1,000 of the planted copies lie above, 3 of 5 other pairs below
BLOCK_IMAGES = 256
BLOCK_PAIRS = 32  # what is worked on stays in the processor's cache: a half faster than with 256

Kind = Literal["exact", "near", "mirrored"]


class LeakConfig(Config):
    """How much an unlabeled image may resemble a validation or test image. Chosen on validation images."""

    enabled: bool = Field(True, description="remove validation and test images from the unlabeled ones")
    mirrored: bool = Field(True, description="also when mirrored, which training does to every image anyway")
    hash_bits: int = Field(12, ge=0, le=16, description="bits of 64 in which the hashes of a candidate may differ")
    crop_hash_bits: int = Field(8, ge=0, le=16, description="the same for candidates that are crops")
    max_distance: float = Field(
        0.15, ge=0, le=1, description="1 - correlation of aligned pixels, at most; 0: the same bytes only"
    )


@dataclass(frozen=True)
class Leak:
    """An unlabeled image's counterpart among the evaluation images: 0 is the same, LeakConfig.max_distance the farthest."""

    evaluation_key: str
    kind: Kind
    distance: float


def evaluation_table(keys: Sequence[str], sha256: Sequence[str], thumbnails: np.ndarray) -> pa.Table:
    """What a LeakIndex is made from, by INDEX_SCHEMA: 1.1 kB an evaluation image. Tables may be concatenated.

    `sha256` of the images' bytes; `thumbnails` uint8 [n, SIDE, SIDE] as by `gray_thumbnail`.
    """
    return pa.table([keys, sha256, [thumbnail.tobytes() for thumbnail in thumbnails]], schema=INDEX_SCHEMA)


class LeakIndex:
    """The evaluation images, to stream others past. Immutable; make one a process.

    Evaluation images without detail (blank, or smooth as a sky) are found by their bytes only, or they would match each other.
    100,000 images load in 15 s from 100 MB and take 0.4 GB (0.6 meanwhile): an image has a thumbnail of 1 kB and 121 hashes
    of 8 bytes, each in three lists of 4 bytes; the lists' tables have 32 MB whatever the number of images. Streaming past
    costs 0.2 ms an image against 10,000 evaluation images and 0.8 ms against 100,000 (one core, 32 px; decoding a
    500 x 400 JPEG costs 1.6 ms, its thumbnail 0.3 ms).
    """

    def __init__(self, config: LeakConfig, table: pa.Table) -> None:
        self._config = config
        self._keys = table["key"].to_pylist()
        self._by_sha256 = {digest: n for n, digest in reversed(list(enumerate(table["sha256"].to_pylist())))}
        pixels = np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8)
        self._thumbnails = pixels.reshape(-1, SIDE, SIDE)
        near = len(self._keys) if config.max_distance else 0  # equal pictures in other bytes are at distance 0 too
        blocks = [self._thumbnails[at : at + BLOCK_IMAGES] for at in range(0, near, BLOCK_IMAGES)]
        recognizable = [detail(block) >= LEAST_DETAIL for block in blocks]
        self._numbers = np.flatnonzero(np.concatenate([np.empty(0, bool), *recognizable]))
        self._flips = 2 if config.mirrored else 1
        hashes = box_hashes(self._thumbnails[self._numbers])
        self._whole = HammingIndex(hashes[:, 0], config.hash_bits)
        self._crops = HammingIndex(hashes[:, 1:].ravel(), config.crop_hash_bits)

    def find(self, sha256: Sequence[str], thumbnails: np.ndarray) -> list[Leak | None]:
        """The nearest evaluation image of each of n images, where one is near enough to count as a leak.

        `sha256` of their bytes; `thumbnails` uint8 [n, SIDE, SIDE] as by `gray_thumbnail`. Of equally near evaluation
        images it is the first of the table. Each answer depends on its own image only, not on the others of the call.
        With `max_distance` 0 only the same bytes count, and no picture is looked at.
        """
        found: list[Leak | None] = [None] * len(thumbnails)
        for at in range(0, len(thumbnails) if self._config.max_distance else 0, BLOCK_IMAGES):
            found[at : at + BLOCK_IMAGES] = self._find_near(thumbnails[at : at + BLOCK_IMAGES])
        for place, digest in enumerate(sha256):
            if digest in self._by_sha256:
                found[place] = Leak(self._keys[self._by_sha256[digest]], "exact", 0.0)
        return found

    def candidates(self, thumbnails: np.ndarray) -> "Candidates":
        """The evaluation images that thumbnails uint8 [n, SIDE, SIDE] may be copies of, by their hashes."""
        found, low = [], spectra(thumbnails)
        for mirrored in range(self._flips):
            hashes = hash_spectra(low * MIRRORING if mirrored else low)
            for index, boxes in ((self._whole, BOX_NUMBERS[:1]), (self._crops, BOX_NUMBERS[1:])):
                rows, entries, bits = index.search(hashes)
                numbers, box = np.divmod(entries, len(boxes))
                flips = np.full(len(rows), mirrored)
                found.append(np.stack([rows, self._numbers[numbers], flips, bits, boxes[box]], axis=1))
        pairs = np.unique(np.concatenate(found), axis=0)  # sorted: the box with the fewest differing bits comes first
        _, first = np.unique(pairs[:, :3], axis=0, return_index=True)
        rows, numbers, flips, _, box = pairs[first].T
        return Candidates(rows, numbers, flips == 1, box)

    def distances(self, thumbnails: np.ndarray, candidates: "Candidates") -> np.ndarray:
        """Lay the thumbnails [n, SIDE, SIDE] over their candidates: 1 - correlation, float32 [candidates], 0 and more.

        Infinite where the one does not look like the other even before it is laid exactly.
        """
        distances = np.full(len(candidates.rows), np.inf, np.float32)
        for at in range(0, len(distances), BLOCK_PAIRS):
            rows, numbers, mirrored, boxes = (column[at : at + BLOCK_PAIRS] for column in candidates)
            seen, own = thumbnails[rows], self._thumbnails[numbers]
            seen = np.where(mirrored[:, None, None], seen[:, :, ::-1], seen)
            alike = likeness(seen, cut_boxes(own, boxes))
            hopeful = np.flatnonzero(alike >= LEAST_LIKENESS)
            moved, maps = align(seen[hopeful], own[hopeful], box_maps(BOXES[boxes[hopeful]]))
            better = np.where(plausible(maps), likeness(seen[hopeful], moved), -1)  # some alignments go astray
            distances[at + hopeful] = 1 - np.minimum(np.maximum(alike[hopeful], better), 1)
        return distances

    def _find_near(self, thumbnails: np.ndarray) -> list[Leak | None]:
        found: list[Leak | None] = [None] * len(thumbnails)
        candidates = self.candidates(thumbnails)
        distances = self.distances(thumbnails, candidates)
        for place in np.flatnonzero(distances <= self._config.max_distance):
            row, distance = candidates.rows[place], float(distances[place])
            best = found[row]
            if best is None or distance < best.distance:
                kind: Kind = "mirrored" if candidates.mirrored[place] else "near"
                found[row] = Leak(self._keys[candidates.numbers[place]], kind, distance)
        return found


class Candidates(NamedTuple):
    """Pairs of an image and an evaluation image that are worth laying over each other, sorted by both."""

    rows: np.ndarray  # int64 [pairs], the image's place among those asked about
    numbers: np.ndarray  # int64 [pairs], the evaluation image's place in the index's table
    mirrored: np.ndarray  # bool [pairs], whether the evaluation image's mirror image is meant
    boxes: np.ndarray  # int64 [pairs], the crop of BOXES whose hash is the nearest


def cut_boxes(thumbnails: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of each thumbnail [n, SIDE, SIDE] one of BOXES, stretched to the whole: float32 [n, SIDE, SIDE]."""
    down, across = np.divmod(boxes, len(PARTS))
    return STRETCHING[down] @ thumbnails.astype(np.float32) @ np.swapaxes(STRETCHING[across], 1, 2)


def box_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """The hashes of all BOXES of thumbnails uint8 [n, SIDE, SIDE]: uint64 [n, boxes]."""
    hashes = np.empty((len(thumbnails), len(BOXES)), np.uint64)
    for at in range(0, len(thumbnails), BLOCK_PAIRS):
        grays = thumbnails[at : at + BLOCK_PAIRS, None].astype(np.float32)
        rows = PART_COSINES @ grays  # [n, parts, frequencies, SIDE]
        low = rows[:, :, None] @ np.swapaxes(PART_COSINES, 1, 2)  # [n, parts, parts, frequencies, frequencies]
        hashes[at : at + len(low)] = hash_spectra(low.reshape(-1, FREQUENCIES, FREQUENCIES)).reshape(len(low), -1)
    return hashes
