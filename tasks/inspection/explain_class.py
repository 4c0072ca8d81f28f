"""`nst explain`: what a selection took of one class, why, and how the most and the least confident images look."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from storage.artifacts import Manifest
from storage.errors import UserError
from storage.objects import Store
from storage.shards import read_table
from tasks.inspection.images import contact_sheet, read_images
from tasks.selection.decisions import read_decisions

Row = dict[str, Any]


@dataclass(frozen=True)
class ClassStory:
    """One class of a selection.

    `counts`: the class's row of classes.parquet (available, kept, dropped and why, duplicated, copies, threshold). Images
    (key, confidence, decision, copies): the most confident kept ones, the least confident kept ones, and the dropped
    ones nearest to being kept.
    """

    class_name: str
    counts: Row
    most_confident: list[Row]
    least_confident: list[Row]
    nearest_dropped: list[Row]


def explain_class(store: Store, selection: Manifest, labels: Manifest, name: str, images: int) -> ClassStory:
    """The story of a class, by its name or number. Raises UserError naming the classes where it is none of them."""
    import duckdb

    if selection.kind != "selection":
        raise UserError(f"{selection.key} is no selection but a {selection.kind}; give a ref such as digits/1/select")
    label = class_number(selection.metrics["class_names"], name)
    (counts,) = [
        row for row in read_table(store, selection.file("classes.parquet")).to_pylist() if row["label"] == label
    ]
    with duckdb.connect() as connection:
        decisions = read_decisions(store, labels, selection)
        connection.register("decisions", decisions)
        query = "CREATE TEMP TABLE own AS SELECT key, confidence, decision, copies FROM decisions WHERE label = $label"
        connection.execute(query, {"label": label})

        def pick(where: str, order: str) -> list[Row]:
            found = connection.execute(
                f"SELECT * FROM own WHERE {where} ORDER BY {order}, key LIMIT {images}"
            ).fetchall()
            return [dict(zip(("key", "confidence", "decision", "copies"), row, strict=True)) for row in found]

        return ClassStory(
            selection.metrics["class_names"][label],
            counts,
            pick("copies > 0", "confidence DESC"),
            pick("copies > 0", "confidence"),
            # what an interval drops for too much confidence is farther from it than what is below
            pick("copies = 0", "decision = 'above_confidence', confidence DESC"),
        )


def class_number(names: list[str], name: str) -> int:
    """The class of that name, or of that number. Raises UserError naming some classes."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    some = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    raise UserError(f"--class {name!r}: no such class; there are {len(names)}: {some}, or their numbers from 0")


def picture_of(store: Store, data: Manifest, story: ClassStory) -> Image.Image:
    """The images of a class's story as one picture."""
    groups = {
        f"{story.class_name}: most confident of the kept": story.most_confident,
        f"{story.class_name}: least confident of the kept": story.least_confident,
        f"{story.class_name}: most confident of the dropped": story.nearest_dropped,
    }
    keys = list(dict.fromkeys(row["key"] for rows in groups.values() for row in rows))
    images = dict(zip(keys, read_images(store, data, "unlabeled", keys), strict=True))
    return contact_sheet(
        {title: [(images[row["key"]], f"{row['confidence']:.3f} {_fate(row)}") for row in rows] for title, rows in groups.items() if rows}
    )  # fmt: skip


def _fate(row: Row) -> str:
    return f"x{row['copies']}" if row["copies"] else str(row["decision"]).split("_")[0]
