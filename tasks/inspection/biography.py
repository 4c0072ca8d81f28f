"""`nst sample`: everything that happened to one image, from its source to the students that trained on it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

from storage.artifacts import Manifest, list_artifacts
from storage.errors import UserError
from storage.objects import Store
from storage.runs import list_experiments, list_runs
from storage.shards import index_name, read_table, shard_files
from tasks.inspection.images import FILES_AT_ONCE, batched
from tasks.label import model_roles
from tasks.selection.decisions import DECISIONS_FILE
from tasks.source_parts import sample_key
from tasks.sources import SPLITS

Row = dict[str, Any]
KEY_OF_A_ROW = re.compile(r"-(\d{8,})$")  # of a file's name and a row; an image file's own key ends in 12 hex digits
PLACE = ("offset", "bytes", "sha256", "label", "width", "height", "source")


@dataclass(frozen=True)
class Biography:
    """What is known of a key. Every row names the artifact it comes from, by its name in a run where it has one.

    Keys are made of a file's name and a row, so several data sets may know a key, each for another image: labels and
    selections say of which (`dataset`, `sha256`).
    """

    key: str
    places: list[Row] = field(
        default_factory=list
    )  # dataset, split, shard, and `PLACE`; models: that trained on it as a labeled image
    rejects: list[Row] = field(default_factory=list)  # dataset, split, source, row, reason
    leaks: list[Row] = field(default_factory=list)  # dataset, source, evaluation_key, kind, distance
    labels: list[Row] = field(default_factory=list)  # dataset, sha256, labels, models, label, class_name, confidence
    selections: list[Row] = field(
        default_factory=list
    )  # dataset, sha256, selection, decision, copies, threshold, shards, students


def biography(store: Store, key: str) -> Biography:
    """The biography of an image by its key in a data set, or of a rejected one by its source's path too.

    Raises UserError where no data set knows it.
    """
    manifests, names, files = list_artifacts(store), artifact_names(store), _source_files(store)
    found = Biography(key)
    for data in (m for m in manifests if m.kind == "dataset" and _may_hold(files.get(m.key), key)):
        own = {"dataset": names.get(data.key, data.key)}
        for split in (s for s in SPLITS if data.files_under(f"shards/{s}/")):
            for row in _first(_matching(store, data, f"index/{split}/", "key", key)):
                place = _place(data, split, row)
                if split == "labeled":
                    place["models"] = [
                        names.get(m.key, m.key) for m in _followers(manifests, "model", "data", data.key)
                    ]
                found.places.append({**own, "split": split, **place})
                if split == "unlabeled":
                    image = {**own, "sha256": row["sha256"]}
                    for labels in _followers(manifests, "labels", "data", data.key):
                        _add_label(found, store, manifests, names, labels, image, row)
        found.rejects.extend({**own, **row} for row in _rejects(store, data, key))
        found.leaks.extend({**own, **row} for row in _leaks(store, data, key))
    if not (found.places or found.leaks or found.rejects):
        raise UserError(f"no data set of {store.url} has the key {key!r}; keys stand in the index files and the report")
    return found


def artifact_names(store: Store) -> dict[str, str]:
    """Artifact key -> its name in the newest run that has it, such as `digits/2/student`."""
    names: dict[str, str] = {}
    for experiment in list_experiments(store):
        for run in list_runs(store, experiment):
            names |= {node.key: f"{experiment}/{node.name}" for node in run.nodes}
    return names


def _source_files(store: Store) -> dict[str, list[str]]:
    """Data set key -> the names of the files that it was made from, as the runs tell. Not of those in no run."""
    found: dict[str, list[str]] = {}
    for experiment in list_experiments(store):
        for run in list_runs(store, experiment):
            for node in run.nodes:
                if node.kind == "dataset":
                    splits = [split for split in SPLITS if (split == "unlabeled") == (node.stage == "unlabeled")]
                    files = (source.partition(": ") for source in run.sources)
                    found[node.key] = [name for split, _, name in files if split in splits]
    return found


def _may_hold(files: Sequence[str] | None, key: str) -> bool:
    """Whether a data set of these files can have the key: so that no index of the others is opened."""
    row = KEY_OF_A_ROW.search(key)
    return files is None or row is None or any(sample_key(name, int(row[1])) == key for name in files)


def _place(data: Manifest, split: str, row: Row) -> Row:
    """Where an image lies, from its row of the index."""
    shards = {index_name(shard): shard.path for shard in shard_files(data, split)}
    return {"shard": shards[row["file"]], **{name: row[name] for name in PLACE}}


def _add_label(
    found: Biography,
    store: Store,
    manifests: Sequence[Manifest],
    names: Mapping[str, str],
    labels: Manifest,
    image: Row,
    index_row: Row,
) -> None:
    """What a label artifact of the image's own data set says of it, and the selections that were made from that."""
    # the files of labels are those of the data's shards; of labels of a selection they are those of the selection's
    only = None if "selection" in labels.inputs else index_row["number"]
    for row in _first(_matching(store, labels, "predictions/", "key", found.key, only)):
        own = {"class_name": labels.metrics["class_names"][row["label"]]}
        teachers = [names.get(key, key) for key in (labels.inputs[role] for role in model_roles(labels.inputs))]
        found.labels.append({**image, "labels": names.get(labels.key, labels.key), "models": teachers, **row, **own})
        for selection in _followers(manifests, "selection", "labels", labels.key):
            found.selections.append({**image, **_chosen(store, manifests, names, selection, row)})


def _chosen(
    store: Store, manifests: Sequence[Manifest], names: Mapping[str, str], selection: Manifest, labeled: Row
) -> Row:
    """What a selection made of an image, by its row among the labels."""
    import duckdb

    with (
        store.local_copies([selection.file(DECISIONS_FILE), selection.file("classes.parquet")]) as (
            decisions,
            classes,
        ),
        duckdb.connect() as connection,
    ):
        query = "SELECT decision, copies FROM read_parquet($file, hive_partitioning = false) LIMIT 1 OFFSET $place"
        values = {"file": str(decisions), "place": labeled["place"]}
        fate = connection.execute(query, values).fetchone() or ("unknown", 0)
        query = "SELECT threshold FROM read_parquet($file, hive_partitioning = false) WHERE label = $label"
        values = {"file": str(classes), "label": labeled["label"]}
        (threshold,) = connection.execute(query, values).fetchone() or (None,)
    written = _matching(store, selection, "index/", "source_key", labeled["key"]) if fate[1] else ()
    copies = {row["file"] for row in written}
    students = [names.get(m.key, m.key) for m in _followers(manifests, "model", "selection", selection.key)]
    return {
        "selection": names.get(selection.key, selection.key),
        "decision": fate[0],
        "copies": fate[1],
        "threshold": threshold,
        "shards": sorted({shard.path for shard in shard_files(selection, "train") if index_name(shard) in copies}),
        "students": students,
    }


def _followers(manifests: Sequence[Manifest], kind: str, role: str, key: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest.kind == kind and manifest.inputs.get(role) == key]


def _leaks(store: Store, data: Manifest, key: str) -> Iterator[Row]:
    if any(entry.name == "leaks.parquet" for entry in data.files):
        yield from ({k: row[k] for k in ("source", "evaluation_key", "kind", "distance")} for row in _matching(store, data, "leaks.parquet", "key", key))  # fmt: skip


def _rejects(store: Store, data: Manifest, key: str) -> Iterator[Row]:
    """The rejected images of a data set with that source, or that would have had that key."""
    for split in SPLITS:
        for entry in data.files_under(f"rejects/{split}/"):
            for row in read_table(store, entry).to_pylist() if entry.rows else ():
                source = row["source"]
                keys = (source, sample_key(source), sample_key(source.partition(":")[0], row["row"]))
                if key in keys:
                    yield {"split": split, **row}


def _first(rows: Iterator[Row]) -> Iterator[Row]:
    """The first of some rows: a key stands once in a data set, so no more files are opened than are needed."""
    return islice(rows, 1)


def _matching(
    store: Store, manifest: Manifest, prefix: str, column: str, value: str, only: int | None = None
) -> Iterator[Row]:
    """The rows of an artifact's tables (or of one, by its number) where a column has a value.

    With `file` (name), `number` (of the file) and `place` (row of all).
    """
    import duckdb

    entries = manifest.files_under(prefix)
    starts = dict(zip(entries, accumulate([0, *(entry.rows or 0 for entry in entries)]), strict=False))
    numbers = {entry: number for number, entry in enumerate(entries)}
    query = f"""
        SELECT * FROM read_parquet($files, filename = true, file_row_number = true, hive_partitioning = false)
        WHERE {column} = $value
    """
    for some in batched(entries if only is None else entries[only : only + 1], FILES_AT_ONCE):
        with store.local_copies(some) as paths, duckdb.connect() as connection:
            by_path = {str(path): entry for path, entry in zip(paths, some, strict=True)}
            found = connection.execute(query, {"files": list(by_path), "value": value})
            names = [column[0] for column in found.description]
            for values in found.fetchall():
                row = dict(zip(names, values, strict=True))
                entry = by_path[row.pop("filename")]
                place = starts[entry] + row.pop("file_row_number")
                yield {**row, "file": entry.name, "number": numbers[entry], "place": place}
