"""Image files in folders: class folders as torchvision's ImageFolder reads them, or any tree of unlabeled images."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from storage.errors import StoreError, UserError
from storage.external import ExternalFile, ExternalFolder
from storage.images import MAX_BYTES
from storage.keys import digest
from tasks.sources import UNKNOWN_ROWS, Member, RawImage, SourceFile

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".avif",
)
LEAST_FILLED, USUALLY_FILLED = 1 / 8, 1 / 2  # of a shard, where a name may begin the next one, and where one does
READS_AT_ONCE = 16  # a bucket answers many small requests side by side


class ImageFolders:
    """The image files of one folder or bucket; a labeled image's class is the first folder below the split's own."""

    def __init__(self, folder: ExternalFolder, shard_images: int, shard_bytes: int) -> None:
        self._folder = folder
        self._limits = shard_images, shard_bytes

    def describe(self, split: str, files: Sequence[ExternalFile], labels: Sequence[int]) -> list[SourceFile]:
        """The sorted listing cut into stretches, each of a shard's size; a new file changes those beside it only."""
        fingerprints = self._folder.fingerprints(files)
        members = [
            Member(name=file.name, bytes=file.bytes, sha256=sha256, label=label)
            for file, sha256, label in zip(files, fingerprints, labels, strict=True)
        ]
        cuts = cut_by_names(members, *self._limits)
        stretches = [members[a:b] for a, b in zip(cuts, [*cuts[1:], len(members)], strict=True)]
        return [
            SourceFile(
                split=split,
                name=stretch[0].name,
                bytes=sum(member.bytes for member in stretch),
                sha256=digest([(member.name, member.sha256, member.label) for member in stretch]),
                rows=len(stretch),
                members=tuple(stretch),
            )
            for stretch in stretches
        ]

    def labels(self, file: SourceFile) -> np.ndarray:
        """The labels of the listing, int64 [rows]."""
        return np.array([member.label for member in file.members], np.int64)

    def read(self, file: SourceFile, first: int, last: int) -> Iterator[RawImage]:
        """Whole files, some read ahead."""
        members = file.members[first : len(file.members) if last == UNKNOWN_ROWS else last]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            for start in range(0, len(members), READS_AT_ONCE):
                yield from pool.map(self._read, members[start : start + READS_AT_ONCE])

    def _read(self, member: Member) -> RawImage:
        image = RawImage(b"", member.name, member.label, own_name=member.name)
        if member.bytes > MAX_BYTES:
            image.problem = f"too large: a file of {member.bytes:,} bytes, limit {MAX_BYTES:,}"
            return image
        tag = member.sha256.removeprefix("etag:") if member.sha256.startswith("etag:") else ""
        data = b"".join(self._folder.blocks(ExternalFile(name=member.name, bytes=member.bytes, tag=tag)))
        if not tag and hashlib.sha256(data).hexdigest() != member.sha256:
            raise StoreError(f"{self._folder.url_of(member.name)} was replaced since it was listed; run again")
        image.data = data
        return image


def cut_by_names(members: Sequence[Member], most_images: int, most_bytes: int) -> list[int]:
    """Where shards begin in a listing, none with more than `most_images` or `most_bytes` (but one image it may have).

    Cuts at full shards would all move with the first new file. So a shard begins where a hash of the file's name says so,
    on average when it is half full (content-defined chunking, as in LBFS and rsync), and only where none does when it is full.
    """
    cuts, images, size = [0], 0, 0
    for place, member in enumerate(members):
        share = max(1 / most_images, member.bytes / most_bytes)  # of a shard
        filled = max(images / most_images, size / most_bytes)
        full = images == most_images or size + member.bytes > most_bytes
        if images and (full or (filled >= LEAST_FILLED and _chance(member.name) < share / USUALLY_FILLED)):
            cuts.append(place)
            images = size = 0
        images, size = images + 1, size + member.bytes
    return cuts


def _chance(name: str) -> float:
    """A number in [0, 1) that looks random and belongs to the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def folder_of(name: str, depth: int, split: str) -> str:
    """The class folder of an image: the step after the split's own `depth` steps. Raises UserError without one."""
    steps = name.split("/")
    if len(steps) < depth + 2:
        raise UserError(
            f"data.{split}: {name} lies in no class folder; labeled images are laid out as CLASS/IMAGE, or as Parquet or tars"
        )
    return steps[depth]
