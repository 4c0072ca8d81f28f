"""`nst diff`: two label versions of the same images: who changed class, how confidence moved, what is won and lost."""

import tempfile
from dataclasses import dataclass
from typing import Any

from storage.artifacts import Manifest
from storage.errors import UserError
from storage.objects import Store
from tasks.inspection.images import FILES_AT_ONCE, batched

Row = dict[str, Any]


@dataclass(frozen=True)
class LabelDiff:
    """What differs between labels A and B, of the images that both have.

    `flips`: from_class, to_class, images, mean confidence before and after; the most frequent first. `won` images are at
    or above `min_confidence` in B only, `lost` ones in A only. `shift`: mean of B's confidence less A's.
    """

    images: int
    only_in_a: int
    only_in_b: int
    flipped: int
    shift: float
    min_confidence: float
    won: int
    lost: int
    flips: list[Row]
    per_class: list[Row]  # class_name (A's), images, flipped, shift, won, lost


def diff_labels(store: Store, a: Manifest, b: Manifest, min_confidence: float) -> LabelDiff:
    """Compare two label artifacts by key; out of core. Raises UserError where they are no labels of the same classes."""
    import duckdb

    for manifest in (a, b):
        if manifest.kind != "labels":
            raise UserError(
                f"{manifest.key} is no label artifact but a {manifest.kind}; give refs such as digits/1/label"
            )
    names = a.metrics["class_names"]
    if names != b.metrics["class_names"]:
        raise UserError("the two label versions have other classes; only labels of the same classes can be compared")
    joined = """
        CREATE TEMP TABLE pairs AS
        SELECT a.label AS before, b.label AS after, a.confidence AS old, b.confidence AS new,
            a.key IS NULL AS only_b, b.key IS NULL AS only_a
        FROM a FULL JOIN b ON a.key = b.key
    """
    facts = """
        count(*) AS images, coalesce(sum((before != after)::INT), 0)::BIGINT AS flipped,
        coalesce(avg(new::DOUBLE - old), 0) AS shift,
        coalesce(sum((new >= $least::FLOAT AND old < $least::FLOAT)::INT), 0)::BIGINT AS won,
        coalesce(sum((old >= $least::FLOAT AND new < $least::FLOAT)::INT), 0)::BIGINT AS lost
    """
    both = "FROM pairs WHERE NOT only_a AND NOT only_b"
    with tempfile.TemporaryDirectory(prefix="nst-diff-") as folder, duckdb.connect() as connection:
        connection.execute("SET temp_directory = $folder", {"folder": folder})
        for name, manifest in (("a", a), ("b", b)):
            _load(connection, name, store, manifest)
        connection.execute(joined)
        least = {"least": min_confidence}
        (total,) = _rows(connection, f"SELECT {facts} {both}", least)
        ends = "SELECT count(*) FILTER (only_a) AS a, count(*) FILTER (only_b) AS b FROM pairs"
        (only,) = _rows(connection, ends)
        flips = f"""
            SELECT before, after, count(*) AS images, avg(old) AS old, avg(new) AS new {both} AND before != after
            GROUP BY before, after ORDER BY images DESC, before, after
        """
        flipped = [
            {"from_class": names[row.pop("before")], "to_class": names[row.pop("after")], **row}
            for row in _rows(connection, flips)
        ]
        per_class = [
            {"class_name": names[row.pop("before")], **row}
            for row in _rows(connection, f"SELECT before, {facts} {both} GROUP BY before ORDER BY before", least)
        ]
    return LabelDiff(
        only_in_a=only["a"], only_in_b=only["b"], min_confidence=min_confidence, flips=flipped, per_class=per_class, **total
    )  # fmt: skip


def _load(connection: Any, name: str, store: Store, labels: Manifest) -> None:
    """Make a table of an artifact's predictions; of a bucket's files only some at once are kept here."""
    connection.execute(f"CREATE TEMP TABLE {name} (key VARCHAR, label INTEGER, confidence FLOAT)")
    query = f"""
        INSERT INTO {name} SELECT key, label, confidence FROM read_parquet($files, hive_partitioning = false)
    """
    for some in batched(labels.files_under("predictions/"), FILES_AT_ONCE):
        with store.local_copies(some) as paths:
            connection.execute(query, {"files": [str(path) for path in paths]})


def _rows(connection: Any, query: str, values: Row | None = None) -> list[Row]:
    found = connection.execute(query, values or {})
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
