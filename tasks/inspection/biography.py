"""`nst sample`: everything that happened to one image, from its source to the students that trained on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from storage.artifacts import Manifest, list_artifacts
from storage.errors import UserError
from storage.objects import Store
from storage.runs import list_experiments, list_runs
from storage.shards import index_name, shard_files
from tasks.inspection.images import FILES_AT_ONCE, batched, locate_images
from tasks.label import model_roles
from tasks.selection.decisions import DECISIONS_FILE
from tasks.sources import SPLITS

Row = dict[str, Any]


@dataclass(frozen=True)
class Biography:
    """What is known of a key. Every row names the artifact it comes from, by its name in a run where it has one."""

    key: str
    places: list[Row] = field(
        default_factory=list
    )  # data set, split, shard, offset, bytes, sha256, size, label, source
    leaks: list[Row] = field(default_factory=list)  # data set, evaluation_key, kind, distance
    labels: list[Row] = field(default_factory=list)  # labels, models, label, class_name, confidence
    selections: list[Row] = field(default_factory=list)  # selection, decision, copies, threshold, shards, students


def biography(store: Store, key: str) -> Biography:
    """The biography of an image by its key in a data set. Raises UserError where no data set knows it."""
    manifests, names = list_artifacts(store), artifact_names(store)
    found = Biography(key)
    for data in (m for m in manifests if m.kind == "dataset"):
        name = names.get(data.key, data.key)
        for split in (s for s in SPLITS if data.files_under(f"shards/{s}/")):
            for place in locate_images(store, data, split, [key]).values():
                found.places.append({"dataset": name, "split": split, **place})
        found.leaks.extend({"dataset": name, **row} for row in _leaks(store, data, key))
    if not found.places and not found.leaks:
        raise UserError(f"no data set of {store.url} has the key {key!r}; keys stand in the index files and the report")
    for labels in (m for m in manifests if m.kind == "labels"):
        for row in _matching(store, labels, "predictions/", "key", key):
            own = {"class_name": labels.metrics["class_names"][row["label"]]}
            teachers = [names.get(key, key) for key in (labels.inputs[role] for role in model_roles(labels.inputs))]
            found.labels.append({"labels": names.get(labels.key, labels.key), "models": teachers, **row, **own})
            for selection in _followers(manifests, "selection", "labels", labels.key):
                found.selections.append(_chosen(store, manifests, names, selection, row))
    return found


def artifact_names(store: Store) -> dict[str, str]:
    """Artifact key -> its name in the newest run that has it, such as `digits/2/student`."""
    names: dict[str, str] = {}
    for experiment in list_experiments(store):
        for run in list_runs(store, experiment):
            names |= {node.key: f"{experiment}/{node.name}" for node in run.nodes}
    return names


def _chosen(
    store: Store, manifests: Sequence[Manifest], names: dict[str, str], selection: Manifest, labeled: Row
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


def _matching(store: Store, manifest: Manifest, prefix: str, column: str, value: str) -> Iterator[Row]:
    """The rows of an artifact's tables where a column has a value, with `file` (name) and `place` (row of all)."""
    import duckdb

    entries = manifest.files_under(prefix)
    starts = dict(zip(entries, accumulate([0, *(entry.rows or 0 for entry in entries)]), strict=False))
    query = f"""
        SELECT * FROM read_parquet($files, filename = true, file_row_number = true, hive_partitioning = false)
        WHERE {column} = $value
    """
    for some in batched(entries, FILES_AT_ONCE):
        with store.local_copies(some) as paths, duckdb.connect() as connection:
            by_path = {str(path): entry for path, entry in zip(paths, some, strict=True)}
            found = connection.execute(query, {"files": list(by_path), "value": value})
            names = [column[0] for column in found.description]
            for values in found.fetchall():
                row = dict(zip(names, values, strict=True))
                entry = by_path[row.pop("filename")]
                yield {**row, "file": entry.name, "place": starts[entry] + row.pop("file_row_number")}
