"""The images that a report shows: as data URIs within the page, and the pairs that the leak guard found."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from storage.artifacts import Manifest
from storage.images import decode_rgb
from storage.objects import Store
from storage.shards import ShardReader, read_table, shard_files
from tasks.inspection.images import locate_images

TILE_PX = 160  # larger images are shrunk to it, or a page of photographs would weigh 100 MB
SMALL_PX = 64  # smaller images are shown with their pixels as squares

Row = dict[str, Any]


def image_uri(data: bytes) -> tuple[str, int]:
    """An image as a data URI, shrunk to `TILE_PX`, and the longer side of what is in it. Always encoded anew.

    Small pictures stay exact (PNG); shrunk ones are JPEG. What a source hid behind the pixels does not enter the page.
    """
    image = decode_rgb(data)
    shrunk = max(image.size) > TILE_PX
    if shrunk:
        image.thumbnail((TILE_PX, TILE_PX), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, **({"format": "JPEG", "quality": 85} if shrunk else {"format": "PNG"}))
    return data_uri(stream.getvalue(), "jpeg" if shrunk else "png"), max(image.size)


def data_uri(data: bytes, subtype: str) -> str:
    """Encoded image bytes as a data URI."""
    return f"data:image/{subtype};base64,{base64.b64encode(data).decode()}"


def shown(reader: ShardReader, place: Row) -> Row:
    """What a page needs to show the image at a place (shard, offset, bytes, sha256): uri and pixelated."""
    uri, side = image_uri(reader.read(place["shard"], place["offset"], place["bytes"], place["sha256"]))
    return {"uri": uri, "pixelated": side <= SMALL_PX}


def leak_section(store: Store, unlabeled: Manifest, evaluation: Manifest, most: int) -> Row | None:
    """What the leak guard left out: the counts by kind, and some pairs of every kind, from the nearest to the farthest."""
    counts: dict[str, int] = unlabeled.metrics.get("leaks", {})
    if not counts:
        return None
    rows = read_table(store, unlabeled.file("leaks.parquet")).to_pylist()
    paths = {shard.name: shard.path for shard in shard_files(unlabeled, "unlabeled")}
    rows = [{**row, "shard": paths[row["shard"]]} for row in rows if row["shard"] in paths]
    picked = [
        row for kind in counts for row in _spread([r for r in rows if r["kind"] == kind], max(1, most // len(counts)))
    ]
    reader = ShardReader(store, [*shard_files(unlabeled, "unlabeled"), *evaluation.files_under("shards/")], whole=False)
    pairs = []
    try:
        places = _evaluation_places(store, evaluation, [row["evaluation_key"] for row in picked])
        for row in picked:
            sides = {"found": shown(reader, row), "evaluation": shown(reader, places[row["evaluation_key"]])}
            pairs.append({name: row[name] for name in ("key", "source", "evaluation_key", "kind", "distance")} | sides)
    finally:
        reader.close()
    return {"counts": counts, "pairs": pairs, "total": sum(counts.values())}


def _spread(rows: list[Row], most: int) -> list[Row]:
    """Up to `most` rows, evenly over the distances."""
    ordered = sorted(rows, key=lambda row: (row["distance"], row["key"]))
    return [ordered[place * len(ordered) // most] for place in range(most)] if len(ordered) > most else ordered


def _evaluation_places(store: Store, evaluation: Manifest, keys: Sequence[str]) -> dict[str, Row]:
    """Where evaluation images lie, by `split/key`."""
    found = {}
    for split in {key.partition("/")[0] for key in keys}:
        own = [key.partition("/")[2] for key in keys if key.startswith(f"{split}/")]
        found.update({f"{split}/{key}": place for key, place in locate_images(store, evaluation, split, own).items()})
    return found
