"""The images that a model is tested on, as rows for a network: from a data set's shards, or published archives as they are.

An archive's images lie in folders of class folders; of ImageNet-P each is a video. They are read one after the other and
are not copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from models.decode import clean_pixels, decode_pixels
from models.loader import IndexedImages
from storage.artifacts import get
from storage.errors import StoreError, UserError
from storage.external import ExternalFile, ExternalFolder
from storage.images import ImageError
from storage.objects import Store


@dataclass(frozen=True)
class View:
    """How a network sees an image: its side in pixels, its center crop; `stored`: all of it, nothing cut off.

    Corrupted images are stored as the network of the benchmark saw them: to crop them again would enlarge them.
    """

    image_size: int
    crop_pct: float
    stored: bool = False


@dataclass(frozen=True)
class Encoded:
    """An image that is not decoded yet: its key, its label in the model's classes, the row of a sequence, its bytes."""

    key: str
    label: int
    data: bytes
    where: str


@dataclass(frozen=True)
class Row:
    """One picture for the network: uint8 [side, side, 3]; `frame` counts within a sequence."""

    key: str
    label: int
    frame: int
    pixels: torch.Tensor


def encoded_images(store: Store, images: dict[str, Any]) -> Iterator[Encoded]:
    """The images that a job names, in order. Raises StoreError where one cannot be read.

    `images` is either a shard {source: {kind, key}, split, shard, classes}, `classes` the model's class of each label; or files of an
    archive {folder: URL, files: [[name, bytes, tag, label]]}.
    """
    if "folder" in images:
        folder = ExternalFolder(images["folder"], "root")
        for name, size, tag, label in images["files"]:
            data = b"".join(folder.blocks(ExternalFile(name, size, tag)))
            yield Encoded(name, label, data, folder.url_of(name))
        return
    source = get(store, images["source"]["kind"], images["source"]["key"])
    indexed = IndexedImages(store, source, images["split"], None, only=images["shard"])
    rows, classes = indexed.rows_of(images["shard"]), images["classes"]
    try:
        for row, data in zip(rows, indexed.bytes_in_order(rows), strict=True):
            label = classes[indexed.labels[row]]
            yield Encoded(indexed.index["key"][row].as_py(), label, data, indexed.name_of(row))
    finally:
        indexed.close()


def decoded(image: Encoded, view: View) -> list[Row]:
    """The pictures of an image as the network sees them: one, or the frames of a video.

    Raises StoreError naming the image where it cannot be decoded, UserError where it has another size than a stored one
    may have.
    """
    if image.key.lower().endswith(".mp4"):
        frames = [torch.from_numpy(frame).permute(2, 0, 1) for frame in video_frames(image.data, image.where)]
    else:
        try:
            frames = [decode_pixels(image.data)]
        except ImageError as error:
            raise StoreError(f"{image.where}: {error}") from error
    return [Row(image.key, image.label, n, _seen(frame, view, image.where)) for n, frame in enumerate(frames)]


def video_frames(data: bytes, where: str) -> list[np.ndarray]:
    """The frames of an mp4, uint8 [h, w, 3] each. Raises UserError without the package, StoreError on a broken file."""
    import io

    try:
        import av
    except ImportError:
        raise UserError(
            "reading ImageNet-P's videos needs the package av; install it: pip install 'noisy-student[video]'"
        ) from None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.error.FFmpegError as error:
        raise StoreError(f"{where}: the video cannot be decoded ({error})") from error
    if not frames:
        raise StoreError(f"{where}: the video has no frames")
    return frames


def _seen(image: torch.Tensor, view: View, where: str) -> torch.Tensor:
    """uint8 [3, h, w] -> uint8 [side, side, 3]."""
    if not view.stored:
        return clean_pixels(image, view.image_size, view.crop_pct)
    height, width = image.shape[1:]
    if height != width:
        raise UserError(
            f"{where} is {width} x {height} pixels; images of such a benchmark are stored as squares. Is `root` the folder of "
            "the published archive?"
        )
    if width != view.image_size:
        size = (view.image_size, view.image_size)
        image = interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return image.permute(1, 2, 0)
