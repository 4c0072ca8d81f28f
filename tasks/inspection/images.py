"""Finding images by key, and showing several as one picture."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image, ImageDraw

from storage.artifacts import Manifest
from storage.images import decode_rgb
from storage.objects import Store
from storage.shards import ShardReader, index_name, shard_files

Row = dict[str, Any]
Item = TypeVar("Item")
FILES_AT_ONCE = 256
TILE_PX, LINE_PX, TEXT_PX, MARGIN_PX = 112, 17, 13, 6
COLUMNS = 8
LINE_CHARACTERS = 16


def locate_images(store: Store, data: Manifest, split: str, keys: Sequence[str]) -> dict[str, Row]:
    """Index rows of images by key: shard, offset, bytes, sha256, label, width, height, source. One pass over the index."""
    import duckdb

    if not keys:  # DuckDB could not tell their type
        return {}
    shards = shard_files(data, split)
    names = ("offset", "bytes", "sha256", "label", "width", "height", "source")
    columns = ", ".join(f'"{name}"' for name in names)
    query = f"""
        SELECT key, filename, {columns}
        FROM read_parquet($files, filename = true, hive_partitioning = false) WHERE key IN (SELECT unnest($keys))
    """
    places: dict[str, Row] = {}
    for some in batched(shards, FILES_AT_ONCE):
        with store.local_copies(data.files_named(index_name(shard) for shard in some)) as copies:
            paths = {str(copy): shard.path for copy, shard in zip(copies, some, strict=True)}
            with duckdb.connect() as connection:
                found = connection.execute(query, {"files": list(paths), "keys": list(keys)}).fetchall()
        places.update(
            {key: {"shard": paths[file], **dict(zip(names, rest, strict=True))} for key, file, *rest in found}
        )
    return places


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive stretches of `size` items: a bucket's files are fetched before they are looked through."""
    return (items[start : start + size] for start in range(0, len(items), size))


def read_images(store: Store, data: Manifest, split: str, keys: Sequence[str]) -> list[Image.Image]:
    """The pictures of these keys, in their order; of a bucket's tars no more than these bytes are fetched."""
    places = locate_images(store, data, split, keys)
    reader = ShardReader(store, shard_files(data, split), whole=False)
    try:
        return [
            decode_rgb(reader.read(place["shard"], place["offset"], place["bytes"], place["sha256"]))
            for place in (places[key] for key in keys)
        ]
    finally:
        reader.close()


def contact_sheet(groups: Mapping[str, Sequence[tuple[Image.Image, str]]], columns: int = COLUMNS) -> Image.Image:
    """One RGB picture of several groups of images, each with its title and a line of text below every image."""
    lines = {title: -(-len(tiles) // columns) for title, tiles in groups.items()}
    cell = TILE_PX + MARGIN_PX
    height = sum(LINE_PX + 2 * MARGIN_PX + count * (cell + LINE_PX) for count in lines.values())
    sheet = Image.new("RGB", (columns * cell + MARGIN_PX, height + MARGIN_PX), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN_PX
    for title, tiles in groups.items():
        draw.text((MARGIN_PX, top), title, fill="black", font_size=TEXT_PX)
        top += LINE_PX + MARGIN_PX
        for number, (image, text) in enumerate(tiles):
            left, line = MARGIN_PX + number % columns * cell, top + number // columns * (cell + LINE_PX)
            sheet.paste(fitted(image), (left, line))
            draw.text((left, line + TILE_PX), text[:LINE_CHARACTERS], fill="black", font_size=TEXT_PX)
        top += lines[title] * (cell + LINE_PX) + MARGIN_PX
    return sheet


def fitted(image: Image.Image) -> Image.Image:
    """The image in a tile: small ones enlarged without smoothing, so that their pixels can be seen."""
    scale = TILE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tile = Image.new("RGB", (TILE_PX, TILE_PX), "lightgray")
    resized = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    tile.paste(resized, ((TILE_PX - size[0]) // 2, (TILE_PX - size[1]) // 2))
    return tile
