"""The images in a lineage page: some of each selection, and the biography of each over all the selections shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.artifacts import Manifest
from storage.errors import StoreError
from storage.lineage import Lineage, State
from storage.objects import Store
from storage.shards import ShardReader, shard_files
from tasks.inspection.images import locate_images
from tasks.report import pick_images
from tasks.report_images import shown
from tasks.selection.decisions import read_decisions

Row = dict[str, Any]
PLACE = ("source", "width", "height", "bytes", "sha256")


@dataclass
class Samples:
    """`images`: of each data set (key) its images by key: uri, pixelated, `PLACE`, and `fates`: a row for each selection.

    `shown`: selection -> keys of its images. `problems`: selection -> why it has none.
    """

    images: dict[str, dict[str, Row]] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def read_samples(store: Store, lineage: Lineage, selections: Sequence[str], most: int) -> Samples:
    """Up to `most` images of each selection, kept and dropped ones in halves, and what became of each of them in the others.

    Reads the decisions of every selection twice, one after the other, and the bytes of the images that are shown.
    """
    import duckdb

    samples, groups = Samples(), dict[str, tuple[Manifest, list[tuple[Manifest, Manifest]]]]()
    for key in selections if most else ():
        sources = _sources(lineage, key)
        if sources is None:
            samples.problems[key] = "the selection, its labels or its data set are no longer in the store"
        else:
            selection, labels, data = sources
            groups.setdefault(data.key, (data, []))[1].append((selection, labels))
    for data, pairs in groups.values():
        try:
            samples.images[data.key] = _read_group(store, data, pairs, most, samples.shown)
        except (StoreError, duckdb.Error) as error:  # DuckDB wraps what happened while it was reading
            why = f"no images: {str(error).partition(' Detail: ')[0]}"
            samples.problems |= {selection.key: why for selection, _ in pairs}
    return samples


def _sources(lineage: Lineage, key: str) -> tuple[Manifest, ...] | None:
    """A selection, its labels, its data set; None unless all three are in the store."""
    inputs = lineage.nodes[key].inputs
    nodes = [lineage.nodes[step] for step in (key, *(inputs[role] for role in ("labels", "data") if role in inputs))]
    made = tuple(node.manifest for node in nodes if node.state is State.made and node.manifest is not None)
    return made if len(made) == 3 else None


def _read_group(
    store: Store, data: Manifest, pairs: Sequence[tuple[Manifest, Manifest]], most: int, shown_by: dict[str, list[str]]
) -> dict[str, Row]:
    """The images of the selections that were made from one data set."""
    picked = {}
    for selection, labels in pairs:
        fates = pick_images(store, labels, selection, max(1, most // 2))
        picked[selection.key] = [row["key"] for rows in fates.values() for row in rows]
    keys = list(dict.fromkeys(key for own in picked.values() for key in own))
    images = _read_images(store, data, keys)
    for selection, labels in pairs:
        names = selection.metrics["class_names"]
        for row in _fates(store, labels, selection, keys):
            own = {"selection": selection.key, "labels": labels.key, "class_name": names[row["label"]]}
            images[row.pop("key")]["fates"].append({**row, **own})
    shown_by.update(picked)
    return images


def _read_images(store: Store, data: Manifest, keys: Sequence[str]) -> dict[str, Row]:
    places = locate_images(store, data, "unlabeled", keys)
    reader = ShardReader(store, shard_files(data, "unlabeled"), whole=False)
    try:
        return {
            key: {**{name: places[key][name] for name in PLACE}, **shown(reader, places[key]), "fates": []}
            for key in keys
        }
    finally:
        reader.close()


def _fates(store: Store, labels: Manifest, selection: Manifest, keys: Sequence[str]) -> list[Row]:
    """key, label, confidence, decision, copies of some images in a selection. One pass; memory grows with the keys only."""
    import duckdb

    if not keys:
        return []
    with duckdb.connect() as connection:
        connection.register("decisions", read_decisions(store, labels, selection))
        found = connection.execute("SELECT * FROM decisions WHERE key IN (SELECT unnest($keys))", {"keys": list(keys)})
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
