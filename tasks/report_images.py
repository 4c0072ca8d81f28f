"""The images that a report shows: as data URIs within the page, and the pairs that the leak guard found."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from storage.artifacts import Manifest
from storage.images import decode_rgb
from storage.objects import Store
from storage.shards import ShardReader, shard_files
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
    tars = [*shard_files(unlabeled, "unlabeled"), *unlabeled.files_under("leaked/")]
    paths = {tar.name: tar.path for tar in tars}
    rows = _spread(store, unlabeled, max(1, most // len(counts)))
    picked = [{**row, "shard": paths[row["shard"]]} for row in rows if row["shard"] in paths]
    reader = ShardReader(store, [*tars, *evaluation.files_under("shards/")], whole=False)
    pairs = []
    try:
        places = _evaluation_places(store, evaluation, [row["evaluation_key"] for row in picked])
        for row in picked:
            sides = {"found": shown(reader, row), "evaluation": shown(reader, places[row["evaluation_key"]])}
            pairs.append({name: row[name] for name in ("key", "source", "evaluation_key", "kind", "distance")} | sides)
    finally:
        reader.close()
    return {"counts": counts, "pairs": pairs, "total": sum(counts.values())}


def _spread(store: Store, unlabeled: Manifest, most: int) -> list[Row]:
    """Up to `most` leaks of each kind, evenly over the distances. Out of core: a crawl may have millions."""
    import duckdb

    query = """
        WITH ranked AS (
            SELECT *, row_number() OVER (PARTITION BY kind ORDER BY distance, key) - 1 AS place,
                count(*) OVER (PARTITION BY kind) AS num
            FROM read_parquet($file, hive_partitioning = false)
        )
        SELECT key, source, evaluation_key, kind, distance, "offset", bytes, sha256, shard FROM ranked
        WHERE num <= $most OR (place * $most + num - 1) // num * num // $most = place
        ORDER BY kind, distance, key
    """
    with store.local_copy(unlabeled.file("leaks.parquet")) as path, duckdb.connect() as connection:
        found = connection.execute(query, {"file": str(path), "most": most})
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _evaluation_places(store: Store, evaluation: Manifest, keys: Sequence[str]) -> dict[str, Row]:
    """Where evaluation images lie, by `split/key`."""
    found = {}
    for split in {key.partition("/")[0] for key in keys}:
        own = [key.partition("/")[2] for key in keys if key.startswith(f"{split}/")]
        found.update({f"{split}/{key}": place for key, place in locate_images(store, evaluation, split, own).items()})
    return found
