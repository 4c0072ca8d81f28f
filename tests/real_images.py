"""Small real images, encoded as PNG and JPEG, and Parquet files of them in the layout of Hugging Face `datasets`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SPLITS = ("labeled", "val", "test", "unlabeled")


def picture(seed: int = 0, width: int = 12, height: int = 10) -> Image.Image:
    """A smooth colored picture; another one for each seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    base = rng.integers(0, 120, 3)
    ramps = np.stack([columns * 80 / width, rows * 80 / height, (rows + columns) * 80 / (width + height)], axis=-1)
    return Image.fromarray((base + ramps + rng.integers(0, 20, (height, width, 1))).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The image's file in a format that Pillow names."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png(seed: int = 0) -> bytes:
    return encoded(picture(seed))


def jpeg(seed: int = 0) -> bytes:
    return encoded(picture(seed), "JPEG")


def pngs(count: int, first_seed: int = 0) -> list[bytes]:
    """That many different PNGs."""
    return [png(first_seed + number) for number in range(count)]


def image_column(images: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> pa.Array:
    """The column `image`; None is a null."""
    named = paths or [f"{number}.png" for number in range(len(images))]
    values = [None if data is None else {"bytes": data, "path": path} for data, path in zip(images, named, strict=True)]
    return pa.array(values, IMAGE_TYPE)


def write_images(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None = None,
    class_names: Sequence[str] | None = None,
    row_group_rows: int = 7,
) -> Path:
    """Write `image` (and `label`) as `datasets` does, with the class names in the schema's metadata."""
    columns: dict[str, pa.Array] = {"image": image_column(images)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if class_names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_rows)
    return path


def write_splits(
    root: Path, num_labeled: int = 24, num_unlabeled: int = 30, class_names: Sequence[str] = ("cat", "dog", "owl")
) -> Path:
    """A whole data set below `root`: labeled, val, test and unlabeled images; the labels come class after class."""
    num = len(class_names)
    for place, (split, count) in enumerate(zip(SPLITS, (num_labeled, 6, 6, num_unlabeled), strict=True)):
        labels = [number * num // count for number in range(count)]
        own = None if split == "unlabeled" else labels
        write_images(root / f"{split}.parquet", pngs(count, 1000 * place), own, class_names if own else None)
    return root
